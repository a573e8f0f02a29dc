"""Ray trace the scene tinynerf ships with: a brick-built excavator on a studded plate.

`python data/make_lego.py [--out data/lego]` writes 125 views (2 minutes on 2 CPU cores) laid out as NeRF-synthetic
scenes are: RGBA PNGs (straight alpha, sRGB), per view a 4x4 camera-to-world matrix (OpenGL: the camera looks down -z,
y up), world z up. All samples use one fixed pattern: no noise, the same images each time. Each image is reduced to its
own 128 colours, some 44 dB from the full render, far below a NeRF's error, for under 6 MB. The scene's licence: MIT.

`--multiscale` writes data/lego_multiscale instead: each view at 1, 1/2, 1/4 and 1/8 of its size, as mip-NeRF's scenes
are. `--wild` writes data/lego_wild: training views of another exposure and tint each, and with striped boards in front,
as NeRF in the Wild's are; the test views are clean. `--moving` writes data/lego_moving: half as large, each view at a
"time" from 0 to 1 in which the arm swings out, as D-NeRF's scenes are. `--appearing` writes data/lego_appearing: there,
bricks appear and planks vanish besides, which no smooth warp explains. Both have points.npy: points that never move.
"""
import argparse
import json
import zlib
from math import asin, cos, hypot, pi, radians, sin, sqrt
from pathlib import Path

import numpy as np
import taichi as ti
from PIL import Image
from taichi.math import mat3, mat4, mix, sign, smoothstep, vec2, vec3, vec4

SIZE, SAMPLES, ANGLE_X, DISTANCE, PALETTE = 400, 21, 0.6911112070083618, 4.03, 128
TRAIN, TEST = 100, 25  # views
SWING = np.radians((6, 32, 30))  # the turns of boom, stick and bucket from time 0 to 1
STUD, GROUND = 0.072, -0.37  # world units from stud to stud; world z of the plate's top
FAR, EPS, BOX, CYLINDER = 1e9, 1e-3, 0, 1  # limits of a ray's hits, in studs; kinds of primitives
COLOURS = dict(yellow="f4b41a", sand="b99a62", red="c4281c", blue="2a5caa", white="f2f0e8", tan="d8c08c", dark="565a5e",
               light="a3a6a8", black="26282b", orange="ee7420", brown="6e4526", green="4f9440", lime="86b84a",
               purple="8e3fc0")
Prim = ti.types.struct(kind=ti.i32, centre=vec3, half=vec3, axes=mat3, colour=vec3, bore=ti.f32, stripes=vec3)
Node = ti.types.struct(lo=vec3, hi=vec3, skip=ti.i32, prim=ti.i32)


def frame(x, y):
    """Rotation (3, 3) whose rows are local axes: y along `y`, x as near to `x` as it can be."""
    y = np.divide(y, np.linalg.norm(y))
    x = x - np.dot(x, y) * y
    x /= np.linalg.norm(x)
    return np.array([x, y, np.cross(x, y)])


class Scene(list):
    """Boxes and cylinders, as rows for Prim, in studs, z up; the plate's top is z = 0."""

    def place(self, origin, turn=0, tilt=0):
        """What follows is built at `origin`, tilted about y and then turned about z (degrees)."""
        a, b, self.origin = radians(turn), radians(tilt), origin
        self.axes = frame((cos(a) * cos(b), sin(a) * cos(b), -sin(b)), (-sin(a), cos(a), 0))

    def add(self, kind, centre, half, colour, x=(1, 0, 0), y=(0, 1, 0), bore=0, stripes=(0, 0, 0), n=1, step=(0, 0, 0)):
        """n primitives, each `step` on from the last, with the axes frame(x, y); a cylinder stands along y, its half is
        (radius, half length, radius). bore: radius of holes along y, one in a cylinder, one every stud from end to end
        of a box. stripes: black where floor(0.998 stripes . local point) is odd."""
        axes, colour = frame(x, y) @ self.axes, (np.array([*bytes.fromhex(COLOURS[colour])]) / 255) ** 2.2
        for at in centre + np.outer(range(n), step):
            self.append((kind, at @ self.axes + self.origin, half, axes, colour, bore, stripes))

    def box(self, corner, size, colour, **more):
        """Box by its lowest corner and its size."""
        self.add(BOX, corner + np.divide(size, 2), np.divide(size, 2), colour, **more)

    def rod(self, a, d, r, colour, bore=0, **more):
        """Cylinder of radius r from point `a` to a + d; a tube if it has a bore."""
        self.add(CYLINDER, a + np.divide(d, 2), (r, np.linalg.norm(d) / 2, r), colour, (0.3, 0.5, 0.8), d, bore, **more)

    def bricks(self, x, y, z, nx, ny, colour, layers=1, height=1.2):
        """Block of 2 x 2 bricks (narrower at the end of an odd side) with studs on top."""
        for k, u, v in np.ndindex(layers, (nx + 1) // 2, (ny + 1) // 2):
            self.box((x + 2 * u, y + 2 * v, z + k * height), (min(2, nx - 2 * u), min(2, ny - 2 * v), height), colour)
        for u, v in np.ndindex(nx, ny):
            self.rod((x + u + 0.5, y + v + 0.5, z + layers * height), (0, 0, 0.22), 0.3, colour)

    def tiles(self, x, y, z, nx, ny, colour):
        """Tiles of one stud with three black slots each, along x and y in turn, like basket weave."""
        for u, v in np.ndindex(nx, ny):
            self.box((x + u, y + v, z), (1, 1, 0.3), colour, stripes=((0, 6, 0), (6, 0, 0))[round(x + y + u + v) % 2])

    def beams(self, a, b, y, gap, width=0.8):
        """Round-ended beams at y - gap and y + gap, a hole every stud, from a = (x, z) to b, whole studs away."""
        n = round(hypot(*np.subtract(b, a)))
        dx, dz = np.subtract(b, a) / n
        for kind, k, half in ((CYLINDER, 0, 0.45), (BOX, n / 2, n / 2), (CYLINDER, n, 0.45)):
            self.add(kind, (a[0] + k * dx, y - gap, a[1] + k * dz), (half, width / 2, 0.45), "yellow", (dx, 0, dz),
                     bore=0.27, n=2, step=(0, 2 * gap, 0))


def excavator(s, time=0, mid=-1.5):
    """Tracks with a dozer blade; on them, turned, the house and the arm (in the plane y = mid), moving in time."""
    for y in (-4.6, 4.6):  # two tracks of 40 separate links around spoked wheels
        s.place((-2, y, 2.3))
        for k in range(40):  # over the top and round a wheel; the way back is its point reflection
            side, u = 1 - 2 * (k % 2), k // 2 * (10 + 1.8 * pi) / 20
            a = max(0, u - 10) / 1.8
            along, out = side * np.array(((cos(a), 0, -sin(a)), (sin(a), 0, cos(a))))
            at = 1.8 * out + (side * (min(u, 10) - 5), 0, 0)
            s.add(BOX, at + 0.3 * out, (0.1, 1.48, 0.14), "black", along)
            s.add(BOX, at + 0.1 * out - (0, 0.8, 0), (0.31, 0.68, 0.13), "dark", along, n=2, step=(0, 1.6, 0))
        for x, z, r in [(-5, 0, 1.68), (5, 0, 1.68)] + [(2 * k - 3, -0.9, 0.85) for k in range(4)]:
            s.rod((x, -1.1, z), (0, 2.2, 0), r, "dark", 0.76 * r)
            s.rod((x, -1.1, z), (0, 2.2, 0), 0.36 * r, "light", 0.16 * r)
            for d in [np.array((cos(a), 0, sin(a))) for a in np.arange(6) * pi / 3]:
                s.add(BOX, 0.58 * r * d + (x, 0, z), (0.25 * r, 0.8, 0.1 * r), "yellow", d)
        s.beams((-4, 0.55), (4, 0.55), 0, 1.25, 0.4)
    s.place((-2, 0, 2.3))
    s.bricks(-4, -3, 0, 8, 6, "dark")
    s.rod((0, 0, 1.2), (0, 0, 1.5), 2.5, "black")
    s.beams((4, 0.6), (8.85, -0.6), 0, 2.4)
    s.box((8.9, -6.5, -1.5), (0.5, 13, 2.6), "yellow", stripes=(2.8, 2.8, 2.8))
    s.box((8.9, -6.45, -2.1), (0.65, 0.9, 0.6), "light", n=13, step=(0, 1, 0))
    s.place((-2, 0, 5), turn=18)
    for block in ((-8, -4, 0, 12, 8, "dark", 1, 0.4), (-5, -3, 0.4, 5, 6, "black", 2), (-5, -4, 2.8, 5, 8, "yellow"),
                  (0, -4, 0.4, 4, 1, "yellow"), (0, 0, 0.4, 4, 4, "yellow"), (0.2, 1.5, 1.6, 2, 2, "blue"),
                  (-0.5, 0.5, 5.8, 5, 4, "yellow", 1, 0.4)):
        s.bricks(*block)
    s.tiles(-5, -4, 4, 5, 8, "yellow")
    s.tiles(-0.5, 0.5, 6.2, 5, 4, "yellow")
    s.box((-8, -4, 0.4), (3, 8, 2.4), "light", stripes=(0, 0, 6))  # ribbed counterweight, sloping hood
    s.box((-8.12, -4, 0.6), (0.12, 8, 1.2), "yellow", stripes=(2.8, 2.8, 2.8))
    s.add(BOX, (-6.5, -3, 3.25), (1.62, 1, 0.4), "yellow", (1, 0, 0.45), stripes=(6, 0, 0), n=4, step=(0, 2, 0))
    for y, v in ((-4, 1), (3, 3.7)):  # grilles before the black wall, handrails; posts of the open cab
        s.box((-5, y + 0.1, 0.5), (4.6, 0.8, 0.25), "light", n=5, step=(0, 0, 0.48))
        s.box((-5, y, 0.4), (0.4, 1, 2.4), "yellow", n=3, step=(2.3, 0, 0))
        s.rod((-4.8, y + 0.5, 4), (0, 0, 1.3), 0.14, "black", n=3, step=(2.3, 0, 0))
        s.rod((-4.8, y + 0.5, 5.3), (4.6, 0, 0), 0.14, "black")
        s.box((0, v, 1.6), (0.3, 0.3, 4.2), "black", n=3, step=(1.85, 0, 0))
    for x, y, z, height, r, colour in ((-3.5, -2, 4, 1.6, 0.4, "light"), (-2, -2, 4, 2, 0.3, "black"),
                                       (1, 1, 6, 1, 0.3, "orange"), (0, 4, 6, 3, 0.15, "black")):
        s.rod((x, y, z), (0, 0, height), r, colour, 0.7 * r * (z == 4))
    arm = np.array(((1.5, 1.6), (4.75, 8.9), (4.95, 9.9), (10.6, 10.2), (9.7, 12), (11.6, 9.6), (11.6, 3.2),
                    (12.7, 2.7), (11.9, 1.3), (10.9, -0.415)))  # (x, z): joints, ends of pistons, bucket, its teeth
    for k, angle in zip((0, 3, 6), time * SWING):  # boom, stick, bucket: a hinge turns all points after it
        arm[k + 1:] += (arm[k + 1:] - arm[k]) @ ((cos(angle) - 1, sin(angle)), (-sin(angle), cos(angle) - 1))
    a, b, f, c, e, g, d, h, bucket, teeth = arm
    for x, z in (a, b, c, d, e):
        s.rod((x, mid - 1.6, z), (0, 3.2, 0), 0.24, "red", 0.12)
    for p, q in ((a, b), (b, c), (e, d)):
        s.beams(p, q, mid, 1)
    for p, q, y in (((3.7, 0.9), a + 0.66 * (b - a), 1.75), (f, e, 0), (g, h, 0)):
        for u, r, colour in ((0.6, 0.3, "dark"), (1, 0.13, "light")):  # a piston's barrel and its rod; two by the boom
            s.rod(np.insert(p, 1, mid - y), np.insert(u * (q - p), 1, 0), r, colour, n=1 + (y > 0), step=(0, 2 * y, 0))
    for p, q in ((a, b), (b, c), (c, d)):  # zigzag of thin rods between the beams
        for k, y in enumerate((0.6, -0.6) * 7):
            s.rod(np.insert(p + (q - p) * k / 14, 1, mid + y), np.insert((q - p) / 14, 1, -2 * y), 0.075, "dark")
    (x, z), turn = bucket, time * SWING.sum()
    for out in [np.array((cos(a), 0, sin(a))) for a in np.radians(range(-100, 126, 25)) + turn]:  # its back, sides
        s.add(BOX, (x, mid, z) + 1.75 * out, (0.12, 2, 0.38), "dark", out)
        s.add(BOX, (x, mid - 1.9, z) + out, (0.8, 0.1, 0.38), "dark", out, n=2, step=(0, 3.8, 0))
    s.add(BOX, np.insert(teeth, 1, mid - 1.7), (0.5, 0.25, 0.125), "light", (cos(turn), 0, sin(turn)), n=5,
          step=(0, 0.85, 0))


def site(s, rng, time=None):
    """Plate of 28 x 24 studs, tiled in stone and grass, with a container, a barrier, cones and a heap of bricks.

    With a time, a tower appears brick by brick, and the barrier's planks vanish. What is not there hides within the
    container: the primitives stay as many."""
    s.place((0, 0, 0))
    s.bricks(-14, -12, -0.7, 28, 24, "dark", 1, 0.4)
    for x, y in np.ndindex(26, 22):
        grass = (x / 12 - 1.04) ** 4 + (y / 10 - 1.05) ** 4 > 0.95 + 0.4 * sin(x)
        s.tiles(x - 13, y - 11, -0.3, 1, 1, "lime" if grass else ("tan", "white")[int(rng.random() < 0.5)])
    s.box((-12.4, -10.8, 0), (12.3, 3, 3.4), "white", stripes=(6, 0, 0))  # container of ribbed sheets
    s.box((-8, 9.7, 0), (0.3, 0.3, 3.4), "dark", n=9, step=(1.5, 0, 0))
    if time is not None:
        for k in range(7):  # not from the ground up: it could be sliding out of the plate then
            x, y, z = (6, -11, 1.2 * k) if time > 0.2 + 0.1 * (3 * k % 7) else (-8, -10.7, 1)
            s.bricks(x, y, z, 4, 2, "purple")
        s.place((0, 0, 0) if time < 0.5 else (-4.25, -18.8, 0))
    for k in range(48):  # barrier
        s.box((0.25 * k - 8, 9.4, 1.1), (0.25, 0.3, 0.8), ("red", "white")[k % 2], n=2, step=(0, 0, 1.3))
    s.place((0, 0, 0))
    for k in range(10):  # cones
        for x, y in ((11.5, -2.5), (11.5, -7.5), (4.5, -8.5), (10.5, 9), (6.5, 9.5)):
            s.rod((x, y, k / 4), (0, 0, 0.45), 0.7 - 0.06 * k if k else 1, "white" if k in (3, 4, 7) else "orange")
    for x, y in rng.normal(size=(45, 2)) * (1.3, 1.9):  # the heap
        z = 0.2 + max(0.1, 2.8 - 0.9 * hypot(x, y)) * rng.random()
        s.place((10 + x, 3.6 + y, z), turn=rng.uniform(0, 360), tilt=rng.uniform(-25, 25))
        colour = ("brown", "sand", "light", "red", "blue", "white")[rng.integers(6)]
        s.bricks(-0.5, -0.5, 0, rng.integers(1, 3), 1, colour, 1, 0.8)


def assemble(time=0, appearing=False):
    """All primitives at a time in [0, 1]: the same ones in the same order at each."""
    s = Scene()
    excavator(s, time)
    site(s, np.random.default_rng(7), time if appearing else None)
    return s


def build(s, fields=()):
    """Two taichi fields, made or refilled: primitives; the tree of their bounds, depth first (skip: where a ray goes on
    a miss)."""
    nodes = []
    centre, half, axes = (np.array(c) for c in list(zip(*s))[1:4])
    reach, parts = np.einsum("nij,ni->nj", abs(axes), half) + 0.002, [np.arange(len(s))]
    while parts:  # a part of n primitives becomes a subtree of 2 n - 1 nodes
        ids = parts.pop()
        n, x, r = len(ids), centre[ids], reach[ids]
        nodes.append(((x - r).min(0), (x + r).max(0), len(nodes) + 2 * n - 1, ids[0] if n == 1 else -1))
        if n > 1:  # halve it along its longest side
            parts += np.array_split(ids[np.argsort(x[:, np.ptp(x, axis=0).argmax()], kind="stable")], 2)[::-1]
    fields = fields or (Prim.field(shape=len(s)), Node.field(shape=len(nodes)))
    for field, rows in zip(fields, (s, nodes)):
        dtypes = dict(kind="i4", skip="i4", prim="i4")
        field.from_numpy({k: np.array(c, dtypes.get(k, "f4")) for k, c in zip(field.keys, zip(*rows))})
    return fields


@ti.func
def enter(p, o, d):
    """Ray o + t d, local, into primitive p: first t > EPS (FAR if none), a normal there."""
    t0, t1, n = -FAR, FAR, vec3(0)
    for k in ti.static(range(3)):
        if p.kind == BOX or k == 1:
            speed = d[k] if abs(d[k]) > 1e-9 else 1e-9
            middle, reach = -o[k] / speed, p.half[k] / abs(speed)
            near, t1 = middle - reach, min(t1, middle + reach)
            if near > t0:
                t0, n = near, -sign(speed) * ti.Vector.unit(3, k)
    a, b = max(d.x * d.x + d.z * d.z, 1e-12), o.x * d.x + o.z * d.z
    if p.kind == CYLINDER:  # without a root take 0: nothing of t0..t1 is left
        root = ti.sqrt(max(b * b - a * (o.x * o.x + o.z * o.z - p.half.x ** 2), 0))
        near, t1 = (-b - root) / a, min(t1, (-b + root) / a)
        if near > t0:
            t0, n = near, vec3(o.x + near * d.x, 0, o.z + near * d.z)
    start = max(t0, EPS)
    if p.bore > 0 and start < t1:  # from within a hole: to its wall, or out at its other end
        q = o + start * d
        q.x -= ti.round(q.x + p.half.x) - p.half.x if p.kind == BOX else 0.0
        b, c = q.x * d.x + q.z * d.z, q.x * q.x + q.z * q.z - p.bore * p.bore
        if c < 0:
            exit = (-b + ti.sqrt(b * b - a * c)) / a
            t0, n = start + exit, -vec3(q.x + exit * d.x, 0, q.z + exit * d.z)
    return (t0 if EPS < t0 < t1 else FAR), n


@ti.func
def trace(prims, nodes, o, d, reach, any_hit):
    """Nearest hit (or any) on o + t d, t < reach: t, primitive (-1 if none), local normal."""
    inv = 1 / ti.select(abs(d) > 1e-9, d, vec3(1e-9))
    best, which, normal, k = reach, -1, vec3(0), 0
    while k < nodes.shape[0] and not (any_hit and which >= 0):
        node, k = nodes[k], k + 1
        ta, tb = (node.lo - o) * inv, (node.hi - o) * inv
        if max(0.0, ti.min(ta, tb).max()) > min(best, ti.max(ta, tb).min()):
            k = node.skip
        elif node.prim >= 0:
            p = prims[node.prim]
            hit, n = enter(p, p.axes @ (o - p.centre), p.axes @ d)
            if hit < best:
                best, which, normal = hit, node.prim, n
    return best, which, normal


@ti.func
def shade(prims, nodes, i, x, d, n_local, u, v):
    """Linear colour of primitive i at x seen along d; u, v in 0..1 choose directions to the sun's disc and the sky."""
    p = prims[i]
    q, n = p.axes @ (x - p.centre), (p.axes.transpose() @ n_local).normalized()
    e = p.half - abs(q)  # near an edge of a box two of these are small: a seam; studs have rings
    groove = (abs(n_local.y) > 0.5 and 0.43 < q.xz.norm() / p.half.x < 0.63 if p.kind == CYLINDER else
              p.bore == 0 and e.sum() - e.max() < min(0.06, 0.3 * p.half.min()))
    colour = p.colour * (0.05 if ti.floor(0.998 * q.dot(p.stripes)) % 2 == 1 else 0.35 if groove else 1.0)
    s = n.cross(vec3(1, 0, 0) if abs(n.x) < 0.6 else vec3(0, 1, 0)).normalized()
    around = ti.cos(2 * pi * u) * s + ti.sin(2 * pi * u) * n.cross(s)
    away, start = ti.sqrt(1 - v) * n + ti.sqrt(v) * around, x + 0.004 * n  # a cosine lobe about n
    open_sky = 0.2 if trace(prims, nodes, start, away, 5.0, True)[1] >= 0 else 1.0
    light = open_sky * mix(vec3(0.28, 0.25, 0.2), vec3(0.5, 0.56, 0.64), 0.5 + 0.5 * n.z)
    cosine = max(0.0, -n.dot(d))
    sky = 0.25 + 0.75 * smoothstep(-0.2, 0.8, d.z + 2 * cosine * n.z)  # brightness of what is mirrored
    gloss = open_sky * (0.04 + 0.5 * (1 - cosine) ** 5) * sky
    sun = (vec3(0.4, -0.48, 0.78) + 0.03 * vec3(u - 0.5, v - 0.5, 0)).normalized()
    if n.dot(sun) > 0 and trace(prims, nodes, start, sun, FAR, True)[1] < 0:
        light += n.dot(sun) * vec3(1.05, 1.0, 0.9)
        gloss += 0.2 * max(0.0, n.dot((sun - d).normalized())) ** 30
    return ti.min(colour * light + gloss, 1.0)


@ti.kernel
def render(prims: ti.template(), nodes: ti.template(), pose: mat4, size: ti.template(),
           image: ti.types.ndarray(vec4, ndim=2), hits: ti.types.ndarray(vec4, ndim=2)):
    """Straight-alpha sRGB image (size, size) from the camera-to-world matrix `pose`; for each pixel a point seen in it,
    in studs, and its primitive (-1 where all is clear)."""
    for row, col in image:
        hits[row, col] = vec4(-1)
        o, total = (pose @ vec4(0, 0, 0, 1)).xyz / STUD - vec3(0, 0, GROUND / STUD), vec4(0)  # of hits: colour, count
        for k in range(SAMPLES):  # a Fibonacci lattice: frac(k / 21), frac(13 k / 21)
            u, v, w = [((m * k) % SAMPLES + 0.5) / SAMPLES for m in ti.static((1, 13, 8))]
            x, y = 2 * (col + u) / size - 1, 1 - 2 * (row + v) / size
            d = (pose @ vec4(ti.tan(ANGLE_X / 2) * vec2(x, y), -1, 0)).xyz.normalized()
            t, i, n = trace(prims, nodes, o, d, FAR, False)
            if i >= 0:
                hits[row, col] = vec4(o + t * d, i)
                total += vec4(shade(prims, nodes, i, o + t * d, d, n, v, w), 1)
        image[row, col] = vec4((total.xyz / max(total.w, 1)) ** (1 / 2.2), total.w / SAMPLES)


def shrink(image, n):
    """Mean of n x n pixels each, colours weighted by alpha."""
    size = len(image) // n
    parts = image.reshape(size, n, size, n, 4)
    alpha = parts[..., 3:].mean((1, 3))
    return np.append((parts[..., :3] * parts[..., 3:]).mean((1, 3)) / np.maximum(alpha, 1e-9), alpha, -1)


def disturb(image, rng):
    """Another exposure and tint, and one to three boards of ten stripes in front of it."""
    image = image.copy()
    image[..., :3] = np.clip(image[..., :3] * 2 ** rng.uniform(-0.8, 0.5) * rng.uniform(0.85, 1.15, 3), 0, 1)
    for _ in range(rng.integers(1, 4)):
        width, height = rng.integers(len(image) // 8, len(image) // 3, 2)
        x, y = rng.integers(0, len(image) - width), rng.integers(0, len(image) - height)
        stripes = np.repeat(rng.random((10, 3)), -(-width // 10), 0)[:width]
        image[y:y + height, x:x + width] = np.append(stripes, np.ones((width, 1)), 1)
    return image


def write_png(path, image):
    """Save (size, size, 4) floats in [0, 1] as RGBA in PALETTE colours, black where clear."""
    pixels = np.round(image * 255).astype(np.uint8)
    rgb = Image.fromarray(pixels[..., :3]).quantize(PALETTE, kmeans=3, dither=Image.Dither.NONE)  # from a median cut
    pixels[..., :3] = np.asarray(rgb.convert("RGB")) * (pixels[..., 3:] > 0)
    size = len(image)
    rows = np.pad(pixels.reshape(size, -1), ((0, 0), (1, 0)))  # unfiltered (0): half the size of Pillow's filtered rows
    png, header = b"\x89PNG\r\n\x1a\n", size.to_bytes(4, "big") * 2 + bytes((8, 6, 0, 0, 0))  # 8 bits, RGBA
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows.tobytes(), 9), b"IEND"):
        png += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(png)


def main():
    """Render all views and write the folder: 100 from over the upper hemisphere to train on, 25 on a spiral to test."""
    parser = argparse.ArgumentParser(description="Render the brick-built scene of tinynerf.")
    parser.add_argument("--out", type=Path, help="folder (default: data/lego, or data/lego_OPTION)")
    group = parser.add_mutually_exclusive_group()
    for name, what in (("multiscale", "each view at four sizes"),
                       ("wild", "training views that differ, with boards in front"),
                       ("moving", "each view at a time of its own; the arm moves"),
                       ("appearing", "the same; bricks appear and others vanish")):
        group.add_argument(f"--{name}", dest="kind", action="store_const", const=name, help=what)
    args = parser.parse_args()
    kind, appearing, moves = args.kind, args.kind == "appearing", args.kind in ("moving", "appearing")
    out, size = args.out or Path(__file__).parent / (f"lego_{kind}" if kind else "lego"), SIZE // (1 + moves)
    ti.init(arch=ti.cpu)
    first, last = assemble(0, appearing), assemble(1, appearing)
    still = np.array([all(map(np.array_equal, p[1:4], q[1:4])) for p, q in zip(first, last)] + [False])  # [-1]: no hit
    fields, image, hits, points = build(first), *np.empty((2, size, size, 4), np.float32), []
    for split, angles in (("train", [(k * pi * (3 - sqrt(5)), asin(0.025 + 0.00976 * k)) for k in range(TRAIN)]),
                          ("test", [(0.4 + 0.24 * pi * k, radians(6 + 2.75 * k)) for k in range(TEST)])):
        (out / split).mkdir(parents=True, exist_ok=True)
        scene = {"camera_angle_x": ANGLE_X, "frames": []}
        times = (np.linspace(0, TRAIN - 1, len(angles)).astype(int) / (TRAIN - 1)).tolist()  # those of training views
        if moves:  # the way the cameras go has nothing to do with time
            angles = np.random.default_rng(7).permutation(angles)
        for k, (a, e) in enumerate(angles):  # azimuth, elevation
            back, right = np.array((cos(a) * cos(e), sin(a) * cos(e), sin(e))), (-sin(a), cos(a), 0)
            pose = np.vstack([np.stack([right, np.cross(back, right), back, DISTANCE * back], 1), (0, 0, 0, 1)])
            more, rng = {"time": times[k]} if moves else {}, np.random.default_rng(k)
            if moves:
                build(assemble(times[k], appearing), fields)
            render(*fields, ti.Matrix(pose), size, image, hits)
            if moves and split == "train":
                seen = hits[still[hits[..., 3].astype(int)]]
                points.append(STUD * rng.choice(seen[:, :3], 20, replace=False) + (0, 0, GROUND))
            shown = disturb(image, rng) if kind == "wild" and split == "train" else image
            for n in (1, 2, 4, 8) if kind == "multiscale" else (1,):
                name = f"r_{k}" if n == 1 else f"r_{k}_{n}"
                write_png(out / split / f"{name}.png", shrink(shown, n) if n > 1 else shown)
                scene["frames"].append({"file_path": f"./{split}/{name}", "transform_matrix": pose.tolist()} | more)
        (out / f"transforms_{split}.json").write_text(json.dumps(scene, indent=1))
    if moves:
        np.save(out / "points.npy", np.concatenate(points).astype(np.float32))


if __name__ == "__main__":
    main()
