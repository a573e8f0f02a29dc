"""tinynerf: train a neural radiance field from photographs with known camera poses, and render new views of it.

    python tinynerf.py train data/lego        trains, evaluates, and leaves pictures, a video and a model in runs/lego
    python tinynerf.py train --resume runs/lego       goes on where that was interrupted
    python tinynerf.py render runs/lego       renders the model again
    python tinynerf.py eval runs/lego         measures it again
    python tinynerf.py bench                  times every kernel
    python tinynerf.py train data/lego --model mipnerf       another member of the family: nerf, mipnerf, nerfw

kernels.py holds everything that a port to another GPU language has to rewrite; this file is what it can keep: scenes,
buffers, the list of launches (forward, backward), the training loop, rendering and the command line.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import gc
import importlib.util
import json
import math
import os
import platform
import posixpath
import re
import shutil
import signal
import sys
import tempfile
import time
import types
import zipfile
import zlib

if sys.version_info >= (3, 14):
    print("tinynerf: Taichi has no build for Python 3.14 or newer\n"
          "          make the virtual environment with Python 3.9 to 3.13", file=sys.stderr)
    sys.exit(2)
os.environ.setdefault("ENABLE_TAICHI_HEADER_PRINT", "False")
try:
    import imageio.v3 as imageio
    import numpy as np
    import PIL.Image                                 # comes with imageio
    import PIL.ImageOps
    import rich.progress
    import taichi as ti
except ModuleNotFoundError as error:
    print(f"tinynerf: the package '{error.name}' is not installed\n"
          "          run the set-up command of README.md (on Debian and Ubuntu, python3-venv first)", file=sys.stderr)
    sys.exit(2)

import kernels as k

VERSION = "0.1"

# Scene and model: the same on every machine
N_CODE = 8                      # numbers learned for each photograph of a capture
N_LEVELS = 6                    # of the hash grid
TABLE_BOUND = 1e-4              # initial table entries: U(+-1e-4)
LEARNING_RATE, FINAL_RATE = 2e-2, 6e-3     # decays exponentially from the one to the other
BETA_1, BETA_2, EPSILON = 0.9, 0.99, 1e-15
EMPTY_ALPHA = 0.01              # a cell whose steps are less opaque than this counts as empty
DARK_AFTER = 256                # rays end in cells that no light has reached for so many steps
DECAY = 0.2                     # of a cell's density, each time it is looked at: every few hundred steps
MIN_LIGHT = 0.15                # samples that add less light than this per side of the box are left out
PLACE = 0.5                     # captures: radius of the ball that is not bent, in median distances of the cameras
NEAR = 0.1                      # captures: distance of the nearest sample in such radii
GROWTH = 4.0                    # unbounded scenes: steps grow by GROWTH / (steps along the diagonal) of the distance
DISTORTION = 0.03               # unbounded scenes: strength of the distortion loss
TRANSIENT = 0.1                 # nerfw: strength of the loss that keeps the transient part thin
HOST_MB = 400                   # what Taichi, its compiler and pictures take besides buffers
READ_EVERY = 16                 # steps between two looks of the host at the counters
CHECKPOINT_SECONDS = 30         # between two checkpoints

# What depends on the machine. march: most samples in flight; batch: samples that a step aims to keep of them, after the
# probe; rays: most rays in flight; coarsest, finest: cells per side of the first and the last level of the hash grid
# (no finer than the pixels); table: slots per level; grid: occupancy cells per side; train_steps, render_steps: samples
# along the box's diagonal (training jitters them, so that coarse steps find thin parts in the mean; a picture needs
# finer ones); refresh: steps between two updates of the occupancy grid, `batch` cells each; block: rays per thread of
# the scan; chunk: samples per partial weight gradient; hash_chunk: samples per writer of the hash gradient, all of them
# for plain adds. A training run lasts so many seconds or steps, and its video has so many frames.
MACHINES = {
    "cpu": dict(march=2**16, batch=2**15, rays=2**15, coarsest=16, finest=512, table=2**17, grid=128, train_steps=256,
                render_steps=512, refresh=8, block=16, chunk=128, hash_chunk=2**16, seconds=90, frames=48),
    "gpu": dict(march=2**19, batch=2**18, rays=2**18, coarsest=16, finest=2048, table=2**19, grid=128, train_steps=1024,
                render_steps=1024, refresh=2, block=128, chunk=512, hash_chunk=1, steps=10000, frames=96),
}

STORED = ("coarsest", "finest", "table", "grid", "train_steps", "render_steps")     # what a model's file says of them

# What differs where space is unbounded: rays see much more of it, and less sharply.
UNBOUNDED = {"cpu": dict(render_steps=256), "gpu": {}}

# The MLPs: inputs, hidden layers, outputs. Their weights follow the hash table in `params`, one MLP after the other.
MLPS = {"density": (N_LEVELS * k.N_FEATURES, 1, k.OUTPUT), "color": (2 * k.OUTPUT, 2, 3)}


class UserError(Exception):
    """Something that the user can mend: main() prints what is wrong and a hint, and exits with code 2."""

    def __init__(self, message, hint):
        super().__init__(message)
        self.hint = hint


# ---- Scenes ---------------------------------------------------------------------------------------------------------

# What a frame, or its file for all frames, may say of a lens, and within which bounds: instant-ngp's names
LENS = ("k1", "k2", "k3", "k4", "p1", "p2")
INTRINSICS = {**dict.fromkeys(("fl_x", "fl_y", "w", "h"), (0, 1e6)),
              **dict.fromkeys(("camera_angle_x", "camera_angle_y"), (0, math.pi)),
              **dict.fromkeys(("cx", "cy") + LENS, (-1e6, 1e6))}
CAMERA_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL", "OPENCV_FISHEYE")


def one_line(error):
    """What an exception says, as one line, with its type where it is not made for reading."""
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__} {text}".strip()


def read_image(path, w=None, h=None):
    """An image file as straight RGBA, [height, width, 4] u8; UserError if it cannot be read, or is no uniform resize of
    w x h, the size that its intrinsics speak of. It is turned as its EXIF entry says only where it fits only then: the
    reconstruction has seen it either way."""
    def fits(width, height):                         # within one pixel
        return w is None or h is None or abs(h * width - w * height) <= max(w, h)
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            if not fits(width, height):
                if not fits(height, width) or image.getexif().get(0x0112, 1) < 5:        # 5 to 8 are quarter turns
                    raise ValueError(f"it is {width}x{height}, its intrinsics say {w:g}x{h:g}")
                image = PIL.ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):           # 16 bit
                image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGBA"))
    except Exception as error:                       # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise UserError(f"cannot use the image {path}: {one_line(error)}",
                        "is it complete? replace it or remove its frame")


def downscale_image(rgba, factor):
    """Area mean of factor x factor pixels, colors weighted by alpha; rows and columns left over are cropped."""
    height, width = rgba.shape[0] // factor, rgba.shape[1] // factor
    total = np.zeros((height, width, 4), np.float32)
    for y, x in np.ndindex(factor, factor):          # one pixel of each block at a time: nothing large in f32
        part = rgba[y:height * factor:factor, x:width * factor:factor].astype(np.float32)
        part[..., :3] *= part[..., 3:]
        total += part
    total[..., :3] /= np.maximum(total[..., 3:], 1)
    total[..., 3] /= factor**2
    return np.rint(total).astype(np.uint8)


def read_json(path):
    """The contents of a JSON file; UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {one_line(error)}", "is the download complete?")


def parse_number(key, x, low, high):
    """x, the JSON value of a key, as a float, or None for null; ValueError unless it is a number in (low, high)."""
    if x is None:
        return None
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not low < x < high:     # NaN is not < either
        raise ValueError(f"{key} = {x!r:.40} is not usable")
    return float(x)


def parse_path(text):
    """A file's name in one spelling; ValueError for what cannot be printed in a line."""
    if not isinstance(text, str) or not text.isprintable():
        raise ValueError(f"{text!r:.40} is not a file's name")
    return posixpath.normpath(text.replace("\\", "/"))


def parse_frame(meta, frame):
    """A frame of a transforms file, with what it leaves to the file, as a namespace: name, mask (or None), pose
    [3, 4] f64, fisheye, and a number or None for each of INTRINSICS. ValueError, KeyError, TypeError ..."""
    values = {**meta, **frame}
    name, model, mask = parse_path(values["file_path"]), values.get("camera_model"), values.get("mask_path")
    pose = np.array(values["transform_matrix"], np.float64)
    if pose.shape not in ((3, 4), (4, 4)):
        raise ValueError(f"the transform_matrix of {name} is not 4x4")
    if model is not None and model not in CAMERA_MODELS:
        raise ValueError(f"camera_model {model!r:.40} is none of {', '.join(CAMERA_MODELS)}")
    numbers = {key: parse_number(key, values.get(key), *bounds) for key, bounds in INTRINSICS.items()}
    if not (numbers["fl_x"] or numbers["camera_angle_x"] or numbers["camera_angle_y"]):
        raise ValueError(f"there is no camera_angle_x and no fl_x for {name}")
    return types.SimpleNamespace(name=name, mask=None if mask is None else parse_path(mask), pose=pose[:3],
                                 fisheye=model == "OPENCV_FISHEYE" or values.get("is_fisheye") is True, **numbers)


def find_image(folder, name):
    """The file of a frame's image, or None."""
    paths = (os.path.join(folder, name + ending) for ending in ("", ".png", ".jpg", ".jpeg", ".webp"))
    return next(filter(os.path.isfile, paths), None)


def count_pixels(path):
    """Pixels of an image file, without reading them; 0 if it is not there or no image."""
    try:
        with PIL.Image.open(path) as image:
            return image.width * image.height
    except Exception:                                # read_image will say what is wrong
        return 0


def load_view(f, folder, downscale, capture):
    """(view, problem) of a frame from parse_frame. view: a namespace of name, rgba [height, width, 4] u8, lens and
    camera (see load_scene), or None if the frame cannot be used. problem: None, or (what it has, which it is)."""
    rotation = f.pose[:, :3]
    if not (np.abs(f.pose).max() < 1e9 and np.linalg.det(rotation) > 0                  # NaN is not < either
            and np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-2):
        return None, ("a pose that is not finite, or whose 3x3 part is no rotation", f.name)
    path, problem = find_image(folder, f.name), None
    if path is None:
        return None, ("no image", f.name)
    try:
        rgba = read_image(path, f.w, f.h)
    except UserError as error:
        return None, ("no usable image", str(error))
    height, width = rgba.shape[:2]
    if min(height, width) < downscale:
        raise UserError(f"--downscale {downscale} leaves nothing of {width}x{height} pixels", "use less")

    if capture:                                      # pixels train, or do not
        trains = rgba[..., 3] >= 128
        try:
            if f.mask is not None:
                trains = np.stack([trains, read_image(os.path.join(folder, f.mask))[..., 0] > 0]).all(0)
        except (UserError, ValueError):              # cannot be stacked
            problem = ("a mask that cannot be read or has another size: it is not used", f.mask)
        rgba[..., 3] = np.where(trains, 255, 0)
    if downscale > 1:
        full, rgba = rgba, downscale_image(rgba, downscale)
        if capture:                                  # the mean of such pixels trains if all of them do
            rows, columns = rgba.shape[0] * downscale, rgba.shape[1] * downscale
            rgba[..., 3] = full[:rows, :columns, 3].reshape(len(rgba), downscale, -1, downscale).min((1, 3))

    w, h = f.w or width, f.h or height
    fx, fy = f.fl_x, f.fl_y
    if fx is None:
        fx = f.camera_angle_x and 0.5 * w / math.tan(0.5 * f.camera_angle_x)
        fy = f.camera_angle_y and 0.5 * h / math.tan(0.5 * f.camera_angle_y)
    cx, cy = 0.5 * w if f.cx is None else f.cx, 0.5 * h if f.cy is None else f.cy
    pixels = np.array([fx or fy, fy or fx, cx, cy]) * (width / w / downscale)
    camera = np.concatenate([f.pose.ravel(), pixels, [getattr(f, key) or 0.0 for key in LENS]])
    return types.SimpleNamespace(name=f.name, rgba=rgba, lens=int(f.fisheye), camera=camera), problem


def load_frames(path, meta, folder, downscale, capture):
    """(views, lines) of a transforms file: load_view's namespaces, for a capture those that are usable, sorted by name;
    and what was wrong with how many frames. The Blender family's frames must all be usable: UserError."""
    try:
        frames = [parse_frame(meta, frame) for frame in meta["frames"]]
        if not frames:
            raise ValueError("there are no frames")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not usable: {one_line(error)}",
                        "it needs camera_angle_x or fl_x, and frames with file_path and a 4x4 transform_matrix")
    wrong, n = {}, len(frames)
    if capture:
        unique = {frame.name: frame for frame in reversed(frames)}
        wrong["the name of an earlier frame"] = [frame.name for frame in frames if frame is not unique[frame.name]]
        frames = [unique[name] for name in sorted(unique)]
    n_pixels = sum(count_pixels(find_image(folder, frame.name)) for frame in frames) // downscale**2
    check_fits(f"reading the {len(frames)} images of {path}", 4 * n_pixels / 1e6, f"use --downscale {2 * downscale}")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        views, problems = zip(*pool.map(lambda frame: load_view(frame, folder, downscale, capture), frames))
    for what, which in filter(None, problems):
        wrong.setdefault(what, []).append(which)
    lines = [f"{len(which)} of {n} frames {'has' if len(which) == 1 else 'have'} {what} (first: {which[0]})"
             for what, which in wrong.items() if which]
    if lines and not capture:
        raise UserError(f"{path}: {lines[0]}", "is the download complete? mend the frame or remove it")
    return [view for view in views if view], lines


def split_views(meta, views):
    """(training views, held-out views, the name of the split) by nerfstudio's train_filenames and test_filenames or
    val_filenames; where these hold out nothing, every 8th view is. ValueError, TypeError for what are no such lists."""
    listed = {key: {parse_path(name) for name in meta.get(key) or ()}
              for key in ("train_filenames", "test_filenames", "val_filenames")}
    train = [view for view in views if view.name in listed["train_filenames"] or not listed["train_filenames"]]
    for split in ("test_filenames", "val_filenames"):
        test = [view for view in views if view.name in listed[split]]
        if test:
            return [view for view in train if view.name not in listed[split]], test, split
    return [view for i, view in enumerate(train) if i % 8], train[::8], "every 8th of train"


def read_placement(meta):
    """Those of aabb_scale, scale (> 0) and offset (3 numbers) that a transforms file has. ValueError, TypeError."""
    placement = {key: parse_number(key, meta.get(key), 0, 1e6) for key in ("aabb_scale", "scale")}
    if meta.get("offset") is not None:
        placement["offset"] = [parse_number("offset", x, -1e6, 1e6) for x in meta["offset"]]
        if len(placement["offset"]) != 3 or None in placement["offset"]:
            raise ValueError("offset is not three numbers")
    return {key: value for key, value in placement.items() if value is not None}


def convert_capture(folder):
    """A folder of another format as the contents of a transforms file, by data/convert.py; UserError."""
    path, meta = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "convert.py"), None
    if os.path.exists(path):
        spec = importlib.util.spec_from_file_location("convert", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            meta = module.convert(folder)
        except ValueError as error:
            raise UserError(f"cannot convert {folder}: {one_line(error)}", "is it complete? see data/README.md")
    if meta is None:
        raise UserError(f"no transforms_train.json or transforms.json in {folder}, nor what data/convert.py knows",
                        "data/README.md says how scenes are laid out")
    return meta


def pack_views(views, alpha):
    """load_view's namespaces as one, see load_scene. Their rgba is taken away: never are all pixels there twice."""
    shapes = [view.rgba.shape for view in views]
    first = np.cumsum([0] + [height * width for height, width, _ in shapes], dtype=np.int64)
    if first[-1] >= 2**31:
        raise UserError(f"{len(views)} views have {first[-1]} pixels, more than 2^31", "use --downscale 2 or more")
    size = [[at, width, height, view.lens] for at, (height, width, _), view in zip(first, shapes, views)]
    pixels, opaque = np.empty(first[-1], np.uint32), True
    for at, end, view in zip(first, first[1:], views):
        pixels[at:end] = np.ascontiguousarray(view.rgba).view("<u4").ravel()
        opaque &= bool((view.rgba[..., 3] == 255).all())
        del view.rgba
    return types.SimpleNamespace(pixels=pixels, size=np.array(size, np.int32), alpha="none" if opaque else alpha,
                                 camera=np.array([view.camera for view in views], np.float32),
                                 names=[view.name for view in views])


def view_image(views, i):
    """View i as straight RGBA, [height, width, 4] u8; not a copy."""
    first, width, height, _ = views.size[i]
    return views.pixels[first:first + width * height].view(np.uint8).reshape(height, width, 4)


def select_views(views, mask):
    """The views that a boolean mask [n] picks, as a namespace like load_scene's."""
    return pack_views([types.SimpleNamespace(name=views.names[i], rgba=view_image(views, i), lens=views.size[i, 3],
                                             camera=views.camera[i]) for i in np.flatnonzero(mask)], views.alpha)


def load_scene(folder, downscale=1):
    """A scene's folder: transforms_train.json (the Blender family), transforms.json (instant-ngp, nerfstudio) or what
    data/convert.py knows. UserError for what cannot be used. Returns a namespace:

    train, test   views, each a namespace of
        pixels    u32 [sum of width * height]: straight RGBA of 8 bits each, red in the lowest; view by view, by rows
        size      i32 [n, 4]: first pixel, width, height, lens (0: perspective, 1: fisheye)
        camera    f32 [n, 22]: camera-to-world matrix [3, 4], y up, z back, in the scene's own units; fx, fy, cx, cy in
                  pixels, whose corner is at 0; OpenCV's k1, k2, k3, k4, p1, p2
        names     n paths
        alpha     "none": all 255; "background": it shows the background; "mask": pixels with 0 do not train, others 255
    split         what is held out as test: "test", "val", "test_filenames", "val_filenames", "every 8th of train"
    capture       False for the Blender family
    placement     what the file says of aabb_scale, scale and offset, see instant-ngp
    skipped       lines that say what was left out
    """
    if not os.path.isdir(folder):
        raise UserError(f"no such folder: {folder}", "data/lego comes along; data/README.md lists others")
    path = {split: os.path.join(folder, f"transforms_{split}.json") for split in ("train", "test", "val")}
    capture = not os.path.exists(path["train"])
    source = os.path.join(folder, "transforms.json") if capture else path["train"]
    if os.path.exists(source):
        meta = read_json(source)
    else:
        source, meta = folder, convert_capture(folder)
    train, skipped = load_frames(source, meta, folder, downscale, capture)
    split = next((split for split in ("test", "val") if os.path.exists(path[split]) and not capture), None)
    placement = {}
    if split:
        test, _ = load_frames(path[split], read_json(path[split]), folder, downscale, capture)
    else:
        try:
            placement = read_placement(meta) if capture else {}
            train, test, split = split_views(meta if capture else {}, train)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{source} is not usable: {one_line(error)}", "mend or remove that entry")
        if len(train) < (2 if capture else 1):       # so many or more: then there is one to test with, too
            raise UserError(f"{source} has {len(train) + len(test)} usable views, {len(train)} of them to train on",
                            "; ".join(skipped) or "a radiance field needs several views")
    origin = np.array([view.camera[3:12:4] for view in train])
    middle = origin.mean(0)
    if capture and np.linalg.norm(origin - middle, axis=1).max() < 1e-4 * (1 + np.linalg.norm(middle)):
        raise UserError(f"{source}: all cameras are in one place", "depth shows only from several places")
    alpha = "mask" if capture else "background"
    return types.SimpleNamespace(train=pack_views(train, alpha), test=pack_views(test, alpha), split=split,
                                 capture=capture, placement=placement, skipped=skipped)


def place_scene(scene):
    """Where the unit cube lies in the world: a namespace with center [3] and side in world units, unbounded (1 if all
    of space is contracted into the cube, see k.contract), near (the nearest sample, in sides of the cube).

    Blender scenes have the box of +-1.5. In the other formats a placement in the file wins, by instant-ngp's rules:
    cube = world scale + offset, and an aabb_scale of 1 says that nothing is outside. Otherwise the ball that stays
    unbent is put around what the cameras look at, as large as they are far away.
    """
    if not scene.capture:
        return types.SimpleNamespace(center=[0.0, 0.0, 0.0], side=3.0, unbounded=0, near=0.05 / 3.0)
    given = scene.placement
    if "scale" in given or "offset" in given or given.get("aabb_scale") == 1:
        scale, unbounded = given.get("scale", 0.33), int(given.get("aabb_scale", 16) > 1)
        center = [(0.5 - offset) / scale for offset in given.get("offset", (0.5, 0.5, 0.5))]
        side = (0.5 / k.RADIUS if unbounded else 1.0) / scale        # instant-ngp's unit cube is as wide as the ball
    else:
        origin, center = scene.train.camera[:, 3:12:4], nearest_to_axes(scene.train.camera)
        side = PLACE * float(np.median(np.linalg.norm(origin - center, axis=1))) / k.RADIUS
        center, unbounded = [float(c) for c in center], 1
    return types.SimpleNamespace(center=center, side=side, unbounded=unbounded, near=NEAR * k.RADIUS)


def over_white(rgba):
    """Straight RGBA u8 over a white background: rgb f32 in [0, 1]."""
    x = rgba.astype(np.float32) / 255.0
    return x[..., :3] * x[..., 3:] + 1.0 - x[..., 3:]


# ---- Model: every buffer, and the lists of launches -----------------------------------------------------------------

def level_layout(settings, n_levels=N_LEVELS):
    """[n_levels, 4] i32 for the hash kernels: resolution, first slot, number of slots, 1 if hashed.

    Resolutions grow geometrically (instant-ngp, equation 3); n_levels < N_LEVELS leaves out the finest. A level whose
    (resolution + 1)^3 vertices fit into `table` slots is dense; the others are hashed into so many (a power of two).
    """
    coarsest, table_slots, rows, first = settings["coarsest"], settings["table"], [], 0
    for l in range(n_levels):
        resolution = round(coarsest * (settings["finest"] / coarsest) ** (l / (N_LEVELS - 1)))
        dense = (resolution + 1) ** 3 <= table_slots
        rows.append((resolution, first, (resolution + 1) ** 3 if dense else table_slots, 0 if dense else 1))
        first += rows[-1][2]
    return np.array(rows, np.int32)


def count_rows(n_in, n_hidden, n_out):
    """Number of rows of 64 weights in an MLP, see kernels.py."""
    return n_in + k.WIDTH * (n_hidden - 1) + n_out


class Model:
    """The field's parameters and all buffers of a step. n = march, the most samples in flight."""

    name, marches = "ngp", True                      # see MODELS; whether an occupancy grid says where samples may be
    KEPT = ("params", "occupancy", "moment", "density_grid", "lit_step")     # buffers that outlive a step,
    DRAWN = ("params", "occupancy")                                          # and those that a picture needs
    nets, more_mlps, code_sets = (), {}, 1           # deep networks, see SampledModel; what only WildModel has

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        """settings: an entry of MACHINES; space: from place_scene; n_photos: that get codes, for their differences. A
        model that only renders (training=False) has no gradients; one that is dry only counts its buffers."""
        self.settings, self.space, self.n_photos, self.n_levels = settings, space, n_photos, n_levels
        self.dry = dry
        self.n_code = N_CODE if n_photos else 0
        n, n_rays, cells = settings["march"], settings["rays"], settings["grid"] ** 3
        layout = level_layout(settings, n_levels)
        self.n_slots = int(layout[:, 2].sum())
        mlps = {name: (n_in + self.n_code * (name != "density"), *rest)
                for name, (n_in, *rest) in {**MLPS, **self.more_mlps}.items()}
        self.n_weights = k.WIDTH * sum(count_rows(*mlp) for mlp in mlps.values())
        self.first_code = self.n_slots * k.N_FEATURES + self.n_weights
        self.n_codes = self.n_code * (n_photos + 1)              # numbers; one code more: the neutral one
        self.n_rows = (self.first_code + self.code_sets * self.n_codes) // k.N_FEATURES
        self.pitch = self.n_weights + 16                         # of a row of `partial`

        f32, i32, u32 = ti.f32, ti.i32, ti.u32
        self.buffers = []
        self.params = self.new(k.rowF, self.n_rows)              # the hash table's slots, the MLPs' weights, the codes
        self.level = self.new(i32, layout.size)                  # [n_levels, 4]
        if not dry:
            self.level.from_numpy(layout.ravel())
        self.occupancy = self.new(u32, cells // 2048 * 129)      # bits: see kernels.py
        self.mlps, first = [], self.n_slots * k.N_FEATURES
        for name, mlp in mlps.items():
            setattr(self, name, self.new_mlp(first, *mlp))
            first += k.WIDTH * count_rows(*mlp)

        self.ray_pixel = self.new(i32, n_rays)                   # index of the pixel
        self.ray_view = self.new(i32, n_rays)                    # and its view
        self.ray = self.new(f32, 8 * n_rays)                     # origin, t_first, direction, t_last
        self.ray_step = self.new(i32, n_rays)
        self.march_span = self.new(i32, 2 * n_rays)              # first sample, number of samples: marched
        self.ray_span = self.new(i32, 2 * n_rays)                # the same of those that are kept
        self.pixel = self.new(f32, 4 * n_rays)                   # color without background, T
        self.depth = self.new(f32, n_rays)
        self.block_start = self.new(i32, -(-n_rays // settings["block"]))
        self.march_counter = self.new(i32, 4)                    # see kernels.py
        self.march_sample = self.new(f32, 5 * n)                 # position, t, dt
        self.march_feature = self.new(k.row64, n)                # the first n_levels * N_FEATURES entries
        self.march_sigma = self.new(f32, n)
        self.keep = self.new(i32, n)                             # 1 if the sample is kept
        self.counter = self.new(i32, 4)
        self.sample = self.new(f32, 5 * n)
        self.sample_ray = self.new(i32, n)
        self.feature = self.new(k.row64, n)
        self.density_hidden = self.new(k.row64, n)
        self.geometry = self.new(k.row16, n)                     # [0] becomes sigma, all of it goes to the color MLP
        self.color_input = self.new(k.row64, n)                  # geometry, spherical harmonics, code
        self.color_hidden = self.new(k.row64, 2 * n)
        self.color_raw = self.new(k.row16, n)                    # 3 are used
        self.rgb_sigma = self.new(f32, 4 * n)
        self.view_size = self.new(i32, 4)                        # of the view that is rendered
        self.view_camera = self.new(f32, k.CAMERA)
        if not training:
            return

        self.grad_params = self.new(k.rowF, self.n_rows)
        self.moment = self.new(k.rowF, 2 * self.n_rows)          # Adam's m, v
        self.partial = self.new(f32, -(-n // settings["chunk"]) * self.pitch)
        self.loss = self.new(f32, n_rays)
        self.distortion = self.new(f32, 3 * n_rays)
        self.grad_pixel = self.new(f32, 4 * n_rays)
        self.grad_feature = self.new(k.row64, n)
        self.grad_density_hidden = self.new(k.row64, n)
        self.grad_geometry = self.new(k.row16, n)
        self.grad_color_input = self.new(k.row64, n)
        self.grad_color_hidden = self.new(k.row64, 2 * n)
        self.grad_color_raw = self.new(k.row16, n)
        self.grad_rgb_sigma = self.new(f32, 4 * n)
        self.density_grid = self.new(f32, cells)                 # -1 where no camera looks
        self.lit_step = self.new(i32, cells)                     # the last step in which light reached the cell
        self.block_density = self.new(f32, 2 * -(-cells // 1024))
        self.threshold = self.new(f32, 1)
        self.cell_counter = self.new(i32, 4)
        self.bad_step = self.new(i32, 1)                         # see k.loss_and_gradient

    def new(self, dtype, n):
        """A zeroed buffer of n entries."""
        self.buffers.append((n, getattr(dtype, "n", 1)))
        try:
            return None if self.dry else ti.ndarray(dtype, n)
        except RuntimeError:
            raise UserError(f"the device has no room for {self.buffer_mb():.0f} MB of buffers",
                            "use a larger --downscale, or --arch cpu")

    def new_mlp(self, first, n_in, n_hidden, n_out):
        """Sizes and rows of an MLP whose weights are the numbers of `params` from `first` on."""
        self.mlps.append(types.SimpleNamespace(
            n_in=n_in, n_hidden=n_hidden, n_out=n_out, first=first,
            weight=self.new(k.row64, n_in + k.WIDTH * (n_hidden - 1)),
            weight_t=self.new(k.row64, k.WIDTH * n_hidden + k.OUTPUT), weight_out=self.new(k.row16, k.WIDTH)))
        return self.mlps[-1]

    def buffer_mb(self):
        """Exact size of all buffers in MB (10^6 bytes); every entry is made of 4-byte numbers."""
        return sum(4 * n * width for n, width in self.buffers) / 1e6

    def initialize(self, seed):
        """Random parameters: the table U(+-1e-4), weights Glorot uniform (bound sqrt(6 / (inputs + outputs))); codes
        are 0 at first."""
        k.fill_uniform(self.n_slots * k.N_FEATURES, 0, TABLE_BOUND, seed, self.params)
        for mlp in self.mlps:
            first = mlp.first
            hidden = [(mlp.n_in, k.WIDTH)] + [(k.WIDTH, k.WIDTH)] * (mlp.n_hidden - 1)
            for n_in, n_out in hidden + [(k.WIDTH, mlp.n_out)]:
                k.fill_uniform(n_in * n_out, first, math.sqrt(6.0 / (n_in + n_out)), seed, self.params)
                first += n_in * n_out
        load_weights(self)


def load_weights(m):
    """Weights into wide rows, after each change of them."""
    for mlp in m.mlps:
        k.load_weights(mlp.n_in, mlp.n_hidden, mlp.n_out, mlp.first, m.params, mlp.weight, mlp.weight_t, mlp.weight_out)
    for net in m.nets:
        load_layers(m, net)


def scan(m, n_rays, span, counter):
    """Numbers of samples to spans."""
    block = m.settings["block"]
    k.sum_counts(n_rays, block, span, m.block_start)
    k.scan_blocks(n_rays, block, m.settings["march"], m.block_start, counter)
    k.claim_spans(n_rays, block, m.block_start, span)


def step_size(m, n_steps):
    """(step length, growth) for about n_steps samples along the box's diagonal: see k.step_distance."""
    return math.sqrt(3.0) / n_steps, m.space.unbounded * GROWTH / n_steps


def march(m, n_rays, limit, n_steps):
    """Rays to samples: at most `limit` more per ray."""
    grid, unbounded = m.settings["grid"], m.space.unbounded
    step = step_size(m, n_steps)
    k.count_samples(n_rays, limit, *step, unbounded, grid, m.ray, m.ray_step, m.pixel, m.occupancy, m.march_span)
    scan(m, n_rays, m.march_span, m.march_counter)
    k.write_samples(n_rays, limit, *step, unbounded, grid, m.ray, m.ray_step, m.occupancy, m.march_span, m.march_sample)
    if unbounded:
        k.contract_samples(m.march_counter, m.march_sample)


def probe(m, counter):
    """Density of the marched samples, or of the occupancy grid's cells."""
    net = m.density
    k.hash_encode_forward(m.n_levels, counter, m.level, m.march_sample, m.params, m.march_feature)
    k.probe_density(net.n_in, counter, m.march_feature, net.weight, net.weight_t, m.march_sigma)


def forward(m, n_rays, n_steps, first_code):
    """Marched samples to pixels: density decides which of them are kept, and only those go on. first_code: where in
    `params` the codes of the views begin."""
    probe(m, m.march_counter)
    k.mark_visible_samples(n_rays, MIN_LIGHT * step_size(m, n_steps)[0], m.march_span, m.march_sample, m.march_sigma,
                           m.pixel, m.keep, m.ray_span)
    scan(m, n_rays, m.ray_span, m.counter)
    k.keep_visible_samples(n_rays, m.march_span, m.march_sample, m.march_feature, m.keep, m.ray_span, m.sample,
                           m.feature, m.sample_ray)

    net, counter, capacity = m.density, m.counter, m.settings["march"]
    k.mlp_forward(net.n_in, net.n_hidden, capacity, counter, m.feature, net.weight, net.weight_out, m.density_hidden,
                  m.geometry)
    k.density_head_forward(counter, m.geometry, m.rgb_sigma)

    net = m.color
    k.color_input_forward(m.n_code, first_code, counter, m.geometry, m.sample_ray, m.ray, m.ray_view, m.params,
                          m.color_input)
    k.mlp_forward(net.n_in, net.n_hidden, capacity, counter, m.color_input, net.weight, net.weight_out, m.color_hidden,
                  m.color_raw)
    k.color_head_forward(counter, m.color_raw, m.rgb_sigma)

    k.composite_forward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.pixel, m.depth)


def backward(m, n_rays):
    """Mirror of forward() for the samples that were kept, bottom to top: from grad_pixel to grad_params."""
    k.composite_backward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.pixel, m.grad_pixel, m.grad_rgb_sigma)
    if m.space.unbounded:
        spread_backward(m, n_rays)
    color_backward(m, m.first_code)
    field_backward(m)


def field_backward(m):
    """The rest of backward(): from grad_color_input to grad_params."""
    net, counter, capacity, chunk, pitch = m.color, m.counter, m.settings["march"], m.settings["chunk"], m.pitch
    k.mlp_backward_weight(net.n_in, net.n_hidden, net.n_out, capacity, chunk, pitch, net.first - m.density.first,
                          counter, m.color_input, m.color_hidden, m.grad_color_hidden, m.grad_color_raw, m.partial)

    net = m.density
    k.density_head_backward(counter, m.rgb_sigma, m.grad_rgb_sigma, m.grad_color_input, m.grad_geometry)
    k.mlp_backward_input(net.n_hidden, net.n_out, capacity, counter, m.density_hidden, net.weight_t, m.grad_geometry,
                         m.grad_density_hidden, m.grad_feature)
    k.mlp_backward_weight(net.n_in, net.n_hidden, net.n_out, capacity, chunk, pitch, 0, counter, m.feature,
                          m.density_hidden, m.grad_density_hidden, m.grad_geometry, m.partial)
    add_chunk = m.settings["hash_chunk"]
    n_chunks = max(512, -(-capacity // add_chunk))                    # a CPU takes 512 turns of a loop as one task
    k.hash_encode_backward(m.n_levels, n_chunks, add_chunk, counter, m.level, m.sample, m.grad_feature, m.grad_params)
    k.sum_partials(m.n_weights, chunk, pitch, m.density.first, counter, m.partial, m.grad_params)


def spread_backward(m, n_rays):
    """The distortion loss, into grad_rgb_sigma."""
    k.distortion_forward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.distortion)
    k.distortion_backward(n_rays, DISTORTION, m.march_counter, m.ray_span, m.sample, m.rgb_sigma, m.distortion,
                          m.grad_rgb_sigma)


def color_backward(m, first_code):
    """The part of backward() that ends in the views' codes: from grad_rgb_sigma to grad_color_input."""
    net, counter, capacity, chunk = m.color, m.counter, m.settings["march"], m.settings["hash_chunk"]
    k.color_head_backward(counter, m.rgb_sigma, m.grad_rgb_sigma, m.grad_color_raw)
    k.mlp_backward_input(net.n_hidden, net.n_out, capacity, counter, m.color_hidden, net.weight_t, m.grad_color_raw,
                         m.grad_color_hidden, m.grad_color_input)
    if m.n_code:
        k.code_backward(m.n_code, first_code, -(-capacity // chunk), chunk, counter, m.sample_ray, m.ray_view,
                        m.grad_color_input, m.grad_params)


def adam(m, step, learning_rate):
    """One step of the optimiser, the step-th (from 1), with Adam's bias corrections folded into the rate."""
    rate = learning_rate * math.sqrt(1.0 - BETA_2**step) / (1.0 - BETA_1**step)
    k.adam_step(m.n_rows, rate, BETA_1, BETA_2, EPSILON, m.params, m.grad_params, m.moment)
    load_weights(m)


def update_occupancy(m, n_cells, first, seed, step):
    """Look at n_cells cells of the occupancy grid anew, from the `first` of the scattered walk on."""
    grid = m.settings["grid"]
    k.place_cell_samples(n_cells, first, grid, *step_size(m, m.settings["train_steps"]), seed, step, m.march_sample,
                         m.cell_counter)
    probe(m, m.cell_counter)
    k.update_density_grid(n_cells, first, grid, DECAY, m.march_sample, m.march_sigma, m.density_grid)
    pack_occupancy(m, step, DARK_AFTER)


def pack_occupancy(m, step, patience):
    """Densities of cells to bits, for marching; patience: steps without light after which a cell is dark."""
    grid = m.settings["grid"]
    k.sum_density_grid(grid**3, 1024, m.density_grid, m.block_density)
    k.find_threshold(grid**3 // 1024, EMPTY_ALPHA, m.block_density, m.threshold)
    k.pack_occupancy(grid**3 // 32, step, patience, m.density_grid, m.threshold, m.lit_step, m.occupancy)
    k.pack_blocks(grid, m.occupancy)


def compare(m, n_rays, views, seed, step, first_code):
    """Forward for the rays of a training step, their loss, and its gradient in their colors."""
    space, n_steps = m.space, m.settings["train_steps"]
    k.generate_rays(n_rays, space.unbounded, space.near, step_size(m, n_steps)[0], 1, seed, step, m.ray_pixel,
                    m.ray_view, views.size, views.camera, m.ray, m.ray_step, m.pixel, m.depth)
    march(m, n_rays, k.END, n_steps)
    forward(m, n_rays, n_steps, first_code)
    compare_pixels(m, n_rays, views, seed, step, m.march_counter)


def compare_pixels(m, n_rays, views, seed, step, counter):
    """Loss of the pixels of a training step, and its gradient in their colors."""
    random_background = int(m.space.unbounded or views.alpha == "background")
    k.loss_and_gradient(n_rays, random_background, int(views.alpha == "mask"), seed, step, counter, m.ray_pixel,
                        views.pixels, m.ray_step, m.pixel, m.loss, m.grad_pixel, m.bad_step)


def train_step(m, n_rays, views, seed, step, learning_rate):
    """One step on n_rays random pixels of `views` (a namespace made by upload_views). Nothing is read back."""
    k.pick_pixels(n_rays, views.n, seed, step, views.size, m.ray_pixel, m.ray_view)
    compare(m, n_rays, views, seed, step, m.first_code)
    k.mark_lit_cells(n_rays, m.settings["grid"], step, m.march_span, m.march_sample, m.march_sigma, m.keep, m.lit_step)
    backward(m, n_rays)
    adam(m, step + 1, learning_rate)


def draw_rays(m, n_rays):
    """Pixels of the view that is rendered, in waves: each takes the rays that light still gets through a few samples
    further."""
    n_steps, space, limit = m.settings["render_steps"], m.space, 8
    k.generate_rays(n_rays, space.unbounded, space.near, step_size(m, n_steps)[0], 0, 0, 0, m.ray_pixel, m.ray_view,
                    m.view_size, m.view_camera, m.ray, m.ray_step, m.pixel, m.depth)
    while True:
        march(m, n_rays, limit, n_steps)
        n_samples, n_kept = m.march_counter.to_numpy()[:2]
        if n_samples == 0 and n_kept == n_rays:
            break
        forward(m, n_rays, n_steps, m.first_code + m.n_photos * m.n_code)    # with the neutral code
        limit = min(2 * limit, m.settings["march"] // m.settings["block"])


def to_cube(camera, space):
    """Cameras [n, 22] in world units as cameras of the unit cube: the scene's box, shifted and scaled."""
    camera = camera.copy()
    camera[:, 3:12:4] = (camera[:, 3:12:4] - space.center) / space.side + 0.5
    return camera


def upload_views(m, views):
    """Views (see load_scene) on the device: pixels u32, size [n, 4] i32, camera [n, 22] f32 in the unit cube."""
    pixels, size = m.new(ti.u32, views.pixels.size), m.new(ti.i32, views.size.size)
    camera = m.new(ti.f32, views.camera.size)
    pixels.from_numpy(views.pixels)
    size.from_numpy(views.size.ravel())
    camera.from_numpy(to_cube(views.camera, m.space).ravel())
    return types.SimpleNamespace(pixels=pixels, size=size, camera=camera, n=len(views.size), alpha=views.alpha)


# ---- The family: other models, of the stages in Part II of kernels.py -----------------------------------------------

class SampledModel(Model):
    """Buffers of a model that samples its rays from end to end, at first coarsely, then where that found something; its
    networks are deep, and there is neither hash grid nor occupancy grid. n = march, the most samples of either kind."""

    marches, KEPT, DRAWN = False, ("params", "moment"), ("params",)

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        n, blocks = settings["march"], settings["blocks"]
        n_rays = max(1, n // (settings["coarse"] + settings["fine"]))        # so that none is ever dropped
        self.settings, self.space, self.n_photos = {**settings, "rays": n_rays}, space, n_photos
        self.n_levels, self.dry, self.buffers, self.n_code, self.n_slots = n_levels, dry, [], 0, 0
        self.mlps, self.nets, f32, i32 = [], [], ti.f32, ti.i32
        for _ in range(MODELS[self.name].n_nets):
            self.nets.append(self.new_net(sum(net.n_weights for net in self.nets), blocks))
        self.n_rows = sum(net.n_weights for net in self.nets) // k.N_FEATURES
        self.pitch = self.nets[0].n_weights + 16                 # of a row of `partial`
        self.params = self.new(k.rowF, self.n_rows)              # of one network after the other

        self.ray_pixel, self.ray_view = self.new(i32, n_rays), self.new(i32, n_rays)
        self.ray, self.ray_step = self.new(f32, 8 * n_rays), self.new(i32, n_rays)
        self.pixel, self.depth = self.new(f32, 4 * n_rays), self.new(f32, n_rays)
        self.block_start = self.new(i32, -(-n_rays // settings["block"]))
        self.coarse, self.fine = (types.SimpleNamespace(
            net=net, span=self.new(i32, 2 * n_rays), counter=self.new(i32, 4), sample=self.new(f32, 5 * n),
            sample_ray=self.new(i32, n)) for net in (self.nets[0], self.nets[-1]))
        self.march_counter, self.counter = self.coarse.counter, self.fine.counter
        self.weight = self.new(f32, n)                           # of the coarse samples in their pixels
        self.feature = self.new(k.row64, n)                      # frequencies
        self.hidden = [self.new(k.row64, layer.n_out * n) for layer in self.nets[0].layers]
        self.density_hidden, self.geometry = self.new(k.row64, n), self.new(k.row16, n)
        self.color_input, self.color_hidden = self.new(k.row64, n), self.new(k.row64, n)
        self.color_raw, self.rgb_sigma = self.new(k.row16, n), self.new(f32, 4 * n)
        self.view_size, self.view_camera = self.new(i32, 4), self.new(f32, k.CAMERA)
        if not training:
            return

        self.grad_params, self.moment = self.new(k.rowF, self.n_rows), self.new(k.rowF, 2 * self.n_rows)
        self.partial = self.new(f32, -(-n // settings["chunk"]) * self.pitch)
        self.loss, self.bad_step = self.new(f32, n_rays), self.new(i32, 1)
        self.grad_pixel, self.grad_rgb_sigma = self.new(f32, 4 * n_rays), self.new(f32, 4 * n)
        self.grad_color_raw, self.grad_color_hidden = self.new(k.row16, n), self.new(k.row64, n)
        self.grad_color_input, self.grad_geometry = self.new(k.row64, n), self.new(k.row16, n)
        self.grad_density_hidden = self.new(k.row64, n)
        self.grad_hidden = [self.new(k.row64, layer.n_out * n) for layer in self.nets[0].layers]

    def new_net(self, first, blocks):
        """A network of 8 layers, the last of them the density MLP's; the encoding enters the first and the fifth."""
        sizes = [(k.WIDTH, 0, blocks), *3 * [(0, blocks, blocks)], (k.WIDTH, blocks, blocks), (0, blocks, blocks),
                 (0, blocks, 1)]
        layers, param, row, row_t = [], first, 0, 0
        for n_x, n_h, n_out in sizes:
            layers.append(types.SimpleNamespace(n_x=n_x, n_h=n_h, n_out=n_out, param=param, row=row, row_t=row_t))
            param += k.WIDTH * n_out * (n_x + k.WIDTH * n_h)
            row, row_t = row + n_out * (n_x + k.WIDTH * n_h), row_t + n_out * n_h * k.WIDTH
        density = self.new_mlp(param, k.WIDTH, 1, k.OUTPUT)
        param += k.WIDTH * count_rows(k.WIDTH, 1, k.OUTPUT)
        n_color = k.OUTPUT + 6 * k.DIRECTION_FREQUENCIES + 4
        color = self.new_mlp(param, n_color, 1, 3)
        return types.SimpleNamespace(
            first=first, n_weights=param + k.WIDTH * count_rows(n_color, 1, 3) - first, layers=layers, density=density,
            color=color, weight=self.new(k.row64, row), weight_t=self.new(k.row64, row_t))

    def initialize(self, seed):
        """Random parameters: layers He uniform (bound sqrt(6 / inputs)), since there are many; MLPs as in ngp."""
        for net in self.nets:
            for layer in net.layers:
                n_in = layer.n_x + k.WIDTH * layer.n_h
                k.fill_uniform(k.WIDTH * layer.n_out * n_in, layer.param, math.sqrt(6.0 / n_in), seed, self.params)
        super().initialize(seed)


class NeRF(SampledModel):
    """Mildenhall et al. 2020: two networks, of which the second sees the samples of both."""
    name = "nerf"


class MipNeRF(SampledModel):
    """Barron et al. 2021: cones, and one network for both levels."""
    name = "mipnerf"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.wide_weight = self.new(ti.f32, self.settings["march"])


class WildModel(Model):
    """Martin-Brualla et al. 2021: ngp, and a part that is another one in each photograph, and uncertain."""
    name, more_mlps, code_sets = "nerfw", {"transient_net": (2 * k.OUTPUT, 2, 5)}, 2

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        super().__init__(settings, space, n_photos, n_levels, training, dry)
        n, n_rays = settings["march"], settings["rays"]
        self.first_transient = self.first_code + self.n_codes    # code: a second one for each photograph
        if training:
            self.transient_input, self.transient_hidden = self.new(k.row64, n), self.new(k.row64, 2 * n)
            self.transient_raw, self.transient = self.new(k.row16, n), self.new(ti.f32, 5 * n)
            self.grad_transient_input, self.grad_transient_hidden = self.new(k.row64, n), self.new(k.row64, 2 * n)
            self.grad_transient_raw, self.grad_transient = self.new(k.row16, n), self.new(ti.f32, 5 * n)
            self.beta, self.grad_beta = self.new(ti.f32, n_rays), self.new(ti.f32, n_rays)


def load_layers(m, net):
    """Weights of a deep network into wide rows."""
    for layer in net.layers:
        k.load_layer(layer.n_x, layer.n_h, layer.n_out, layer.param, layer.row, layer.row_t, m.params, net.weight,
                     net.weight_t)


def sample_rays(m, n_rays, at, size, camera, jitter, seed, step):
    """Rays to samples: `at` is m.coarse, or m.fine after the forward launches of m.coarse. Wipes the pixels."""
    family, n, middle = MODELS[m.name], m.settings["coarse"], MODELS[m.name].middle
    k.generate_rays(n_rays, m.space.unbounded, m.space.near, 0.0, 0, seed, step, m.ray_pixel, m.ray_view, size, camera,
                    m.ray, m.ray_step, m.pixel, m.depth)
    if at is m.coarse:
        k.count_even(n_rays, n, m.ray, at.span)
        scan(m, n_rays, at.span, at.counter)
        k.sample_even(n_rays, n, middle, jitter, seed, step, m.ray, at.span, m.ray_step, at.sample, at.sample_ray)
    else:
        weight = family.weigh(m, n_rays)
        k.count_even(n_rays, m.settings["fine"] + family.merge * n, m.ray, at.span)
        scan(m, n_rays, at.span, at.counter)
        k.sample_where_light_is(n_rays, m.settings["fine"], family.merge, middle, jitter, seed, step, m.ray,
                                m.coarse.span, m.coarse.sample, weight, at.span, m.ray_step, at.sample, at.sample_ray)


def sampled_forward(m, n_rays, at, camera):
    """Samples to pixels."""
    net, counter, capacity, family = at.net, at.counter, m.settings["march"], MODELS[m.name]
    cones = (at.sample_ray, m.ray, m.ray_view, camera) if family.cones else ()
    getattr(k, family.encoding + "_forward")(counter, *cones, at.sample, m.feature)
    h = m.hidden[0]                                  # of which the first layer takes nothing
    for layer, y in zip(net.layers, m.hidden):
        k.layer_forward(layer.n_x, layer.n_h, layer.n_out, layer.row, capacity, counter, m.feature, h, net.weight, y)
        h = y
    mlp = net.density
    k.mlp_forward(mlp.n_in, mlp.n_hidden, capacity, counter, h, mlp.weight, mlp.weight_out, m.density_hidden,
                  m.geometry)
    getattr(k, family.density + "_forward")(counter, m.geometry, m.rgb_sigma)
    k.direction_input_forward(counter, m.geometry, at.sample_ray, m.ray, m.color_input)
    mlp = net.color
    k.mlp_forward(mlp.n_in, mlp.n_hidden, capacity, counter, m.color_input, mlp.weight, mlp.weight_out, m.color_hidden,
                  m.color_raw)
    getattr(k, family.color + "_forward")(counter, m.color_raw, m.rgb_sigma)
    k.composite_forward(n_rays, at.span, at.sample, m.rgb_sigma, m.pixel, m.depth)


def sampled_backward(m, n_rays, at):
    """Mirror of sampled_forward(): from grad_pixel to grad_params."""
    net, counter, capacity, family = at.net, at.counter, m.settings["march"], MODELS[m.name]
    chunk, pitch, mlp = m.settings["chunk"], m.pitch, net.color
    k.composite_backward(n_rays, at.span, at.sample, m.rgb_sigma, m.pixel, m.grad_pixel, m.grad_rgb_sigma)
    getattr(k, family.color + "_backward")(counter, m.rgb_sigma, m.grad_rgb_sigma, m.grad_color_raw)
    k.mlp_backward_input(mlp.n_hidden, mlp.n_out, capacity, counter, m.color_hidden, mlp.weight_t, m.grad_color_raw,
                         m.grad_color_hidden, m.grad_color_input)
    k.mlp_backward_weight(mlp.n_in, mlp.n_hidden, mlp.n_out, capacity, chunk, pitch, mlp.first - net.first, counter,
                          m.color_input, m.color_hidden, m.grad_color_hidden, m.grad_color_raw, m.partial)
    mlp = net.density
    getattr(k, family.density + "_backward")(counter, m.rgb_sigma, m.grad_rgb_sigma, m.grad_color_input,
                                             m.grad_geometry)
    k.mlp_backward_input(mlp.n_hidden, mlp.n_out, capacity, counter, m.density_hidden, mlp.weight_t, m.grad_geometry,
                         m.grad_density_hidden, m.grad_hidden[-1])
    k.mlp_backward_weight(mlp.n_in, mlp.n_hidden, mlp.n_out, capacity, chunk, pitch, mlp.first - net.first, counter,
                          m.hidden[-1], m.density_hidden, m.grad_density_hidden, m.grad_geometry, m.partial)
    k.relu_backward(counter, m.hidden[-1], m.grad_hidden[-1])
    for l, layer in reversed(list(enumerate(net.layers))):
        before = max(l - 1, 0)
        k.layer_backward_weight(layer.n_x, layer.n_h, layer.n_out, capacity, chunk, pitch, layer.param - net.first,
                                counter, m.feature, m.hidden[before], m.grad_hidden[l], m.partial)
        if l > 0:
            k.layer_backward_input(layer.n_h, layer.n_out, layer.row_t, capacity, counter, m.hidden[before],
                                   net.weight_t, m.grad_hidden[l], m.grad_hidden[before])
    k.sum_partials(net.n_weights, chunk, pitch, net.first, counter, m.partial, m.grad_params)


def sampled_step(m, n_rays, views, seed, step, learning_rate):
    """train_step() of the models that sample: the losses of the coarse and of the fine pixels are added."""
    k.pick_pixels(n_rays, views.n, seed, step, views.size, m.ray_pixel, m.ray_view)
    for at in (m.coarse, m.fine):
        sample_rays(m, n_rays, at, views.size, views.camera, 1, seed, step)
        sampled_forward(m, n_rays, at, views.camera)
        compare_pixels(m, n_rays, views, seed, step, at.counter)
        if at is m.coarse and MODELS[m.name].coarse_loss != 1.0:
            k.weigh_loss(n_rays, MODELS[m.name].coarse_loss, m.grad_pixel)
        sampled_backward(m, n_rays, at)
    adam(m, step + 1, learning_rate)


def draw_sampled_rays(m, n_rays):
    """draw_rays() of the models that sample."""
    for at in (m.coarse, m.fine):
        sample_rays(m, n_rays, at, m.view_size, m.view_camera, 0, 0, 0)
        sampled_forward(m, n_rays, at, m.view_camera)


def weigh_points(m, n_rays):
    """NeRF's weights of the coarse samples, from their forward launches."""
    k.weigh_samples(n_rays, 1e-5, m.coarse.span, m.coarse.sample, m.rgb_sigma, m.weight)
    return m.weight


def weigh_cones(m, n_rays):
    """Mip-NeRF's."""
    k.weigh_samples(n_rays, 0.0, m.coarse.span, m.coarse.sample, m.rgb_sigma, m.weight)
    k.widen_weights(n_rays, 0.01, m.coarse.span, m.weight, m.wide_weight)
    return m.wide_weight


def transient_forward(m, n_rays):
    """After forward(): pixels again, with the transient part, and their uncertainty."""
    net, counter, capacity = m.transient_net, m.counter, m.settings["march"]
    k.color_input_forward(m.n_code, m.first_transient, counter, m.geometry, m.sample_ray, m.ray, m.ray_view, m.params,
                          m.transient_input)
    k.mlp_forward(net.n_in, net.n_hidden, capacity, counter, m.transient_input, net.weight, net.weight_out,
                  m.transient_hidden, m.transient_raw)
    k.transient_head_forward(counter, m.transient_raw, m.transient)
    k.composite_both_forward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.transient, m.pixel)
    k.uncertainty_forward(n_rays, m.ray_span, m.sample, m.transient, m.beta)


def transient_backward(m, n_rays):
    """Mirror of transient_forward() in place of backward(): from grad_pixel and grad_beta to grad_params."""
    net, counter, capacity, chunk = m.transient_net, m.counter, m.settings["march"], m.settings["hash_chunk"]
    k.composite_both_backward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.transient, m.pixel, m.grad_pixel,
                              m.grad_rgb_sigma, m.grad_transient)
    if m.space.unbounded:
        spread_backward(m, n_rays)
    k.uncertainty_backward(n_rays, TRANSIENT, m.march_counter, m.ray_span, m.sample, m.transient, m.beta, m.grad_beta,
                           m.grad_transient)
    k.transient_head_backward(counter, m.transient, m.grad_transient, m.grad_transient_raw)
    k.mlp_backward_input(net.n_hidden, net.n_out, capacity, counter, m.transient_hidden, net.weight_t,
                         m.grad_transient_raw, m.grad_transient_hidden, m.grad_transient_input)
    k.mlp_backward_weight(net.n_in, net.n_hidden, net.n_out, capacity, m.settings["chunk"], m.pitch,
                          net.first - m.density.first, counter, m.transient_input, m.transient_hidden,
                          m.grad_transient_hidden, m.grad_transient_raw, m.partial)
    k.code_backward(m.n_code, m.first_transient, -(-capacity // chunk), chunk, counter, m.sample_ray, m.ray_view,
                    m.grad_transient_input, m.grad_params)
    color_backward(m, m.first_code)
    k.transient_input_backward(counter, m.grad_transient_input, m.grad_color_input)
    field_backward(m)


def wild_step(m, n_rays, views, seed, step, learning_rate):
    """train_step() with the transient part."""
    k.pick_pixels(n_rays, views.n, seed, step, views.size, m.ray_pixel, m.ray_view)
    compare(m, n_rays, views, seed, step, m.first_code)
    k.mark_lit_cells(n_rays, m.settings["grid"], step, m.march_span, m.march_sample, m.march_sigma, m.keep, m.lit_step)
    transient_forward(m, n_rays)
    compare_pixels(m, n_rays, views, seed, step, m.march_counter)
    k.weigh_by_uncertainty(n_rays, m.march_counter, m.loss, m.beta, m.grad_pixel, m.grad_beta)
    transient_backward(m, n_rays)
    adam(m, step + 1, learning_rate)


# What a model is made of: its class; a training step, and the pixels of a picture, as lists of launches; the first and
# last learning rate, if not those above; what differs in MACHINES; what its file says otherwise than MODEL_INFO has it.
# Models that sample: number of networks; whether fine samples are added to coarse ones; where in its part of the ray
# a sample lies; what coarse samples weigh; the encoding, and whether it is one of cones; the heads; what the loss of
# coarse pixels counts. Of their settings, coarse and fine are samples per ray, blocks of 64 neurons a layer's width.
SAMPLED = dict(step=sampled_step, draw=draw_sampled_rays,
               info=dict(settings=dict(coarse=(1, 1024), fine=(1, 1024), blocks=(1, 4))))
SAMPLED_CPU = dict(march=2**15, batch=2**13, frames=12, blocks=1)
SAMPLED_GPU = dict(march=2**18, batch=2**17, blocks=4)
MODELS = {name: types.SimpleNamespace(**parts) for name, parts in dict(
    ngp=dict(make=Model, step=train_step, draw=draw_rays, rates=None, settings=dict(cpu={}, gpu={}), info={}),
    nerf=dict(SAMPLED, make=NeRF, rates=(5e-3, 5e-4), n_nets=2, merge=1, middle=0.0, weigh=weigh_points,
              encoding="frequency_encode", cones=False, density="density_softplus", color="color_head",
              coarse_loss=1.0, settings=dict(cpu=dict(SAMPLED_CPU, coarse=24, fine=24),
                                             gpu=dict(SAMPLED_GPU, coarse=64, fine=128))),
    mipnerf=dict(SAMPLED, make=MipNeRF, rates=(5e-3, 5e-4), n_nets=1, merge=0, middle=0.5, weigh=weigh_cones,
                 encoding="integrated_encode", cones=True, density="density_softplus", color="color_wide",
                 coarse_loss=0.1, settings=dict(cpu=dict(SAMPLED_CPU, coarse=32, fine=32),
                                                gpu=dict(SAMPLED_GPU, coarse=128, fine=128))),
    nerfw=dict(make=WildModel, step=wild_step, draw=draw_rays, rates=None, settings=dict(cpu={}, gpu={}), info={}),
).items()}


# ---- Training and rendering -----------------------------------------------------------------------------------------

def read_totals(m):
    """[3] u32, wrapping around: rays dropped, samples marched, samples kept since the model was made."""
    return np.concatenate([m.march_counter.to_numpy()[2:], m.counter.to_numpy()[3:]]).view(np.uint32)


def train(m, views, seed, steps=None, seconds=None, report=lambda **line: None, keep=lambda state: False, resume=None):
    """Train for a number of steps, or for so many seconds of wall clock; the learning rate's schedule spans either.

    views   from upload_views
    report  called every READ_EVERY steps with progress (0..1), step, seconds, loss, psnr, samples_per_second, n_rays
    keep    called then with the state of this loop, a dict of numbers, while the clock stands still: together with the
            model's buffers in KEPT it is all that the steps to come depend on. Training ends early if it returns True
    resume  (state, arrays) that were kept, to go on from there
    Returns the totals: steps, complete, train_seconds, compile_seconds, samples, rays, rays_dropped.
    The clock starts when every kernel has been launched once on nothing.
    """
    grid, batch, refresh = m.settings["grid"], m.settings["batch"], m.settings["refresh"]
    take_step, (first_rate, last_rate) = MODELS[m.name].step, MODELS[m.name].rates or (LEARNING_RATE, FINAL_RATE)
    start = time.perf_counter()
    m.initialize(seed)
    take_step(m, 0, views, seed, 0, 0.0)
    if m.marches:
        update_occupancy(m, 0, 0, seed, 0)
        view_bound = m.new(ti.f32, 4 * views.n)
        k.bound_views(views.n, views.size, views.camera, view_bound)
        k.mark_visible_cells(grid, m.space.unbounded, views.n, m.space.near, views.camera, view_bound, m.density_grid)
        pack_occupancy(m, 0, k.END)                              # every cell that a camera sees may hold something
    now = types.SimpleNamespace(step=0, progress=0.0, seconds=0.0, cell=0, n_rays=min(256, m.settings["rays"]),
                                samples=0, rays=0, rays_dropped=0)
    if resume:
        vars(now).update(resume[0], n_rays=min(resume[0]["n_rays"], m.settings["rays"]))
        for name in m.KEPT:
            getattr(m, name).from_numpy(resume[1][name])
        load_weights(m)
    m.bad_step.fill(k.NEVER)
    ti.sync()
    compile_seconds = time.perf_counter() - start

    rays_since, seen, stop = 0, read_totals(m), False
    start = time.perf_counter() - now.seconds
    while now.progress < 1.0 and not stop:
        rate = first_rate * (last_rate / first_rate) ** now.progress
        take_step(m, now.n_rays, views, seed, now.step, rate)
        now.step, rays_since = now.step + 1, rays_since + now.n_rays
        if m.marches and now.step % min(refresh, 1 + now.step // 64) == 0:   # more often while the field takes shape
            n_cells = min(batch, grid**3)
            update_occupancy(m, n_cells, now.cell, seed, now.step)
            now.cell = (now.cell + n_cells) % grid**3
        now.progress = now.step / steps if steps is not None else (time.perf_counter() - start) / seconds
        if now.step % READ_EVERY == 0 or now.step in (1, 2, 4, 8) or now.progress >= 1.0:
            totals = read_totals(m)                              # waits for the device
            dropped, marched, samples = (int(d) for d in totals - seen)
            now.samples, now.rays = now.samples + samples, now.rays + rays_since - dropped
            now.rays_dropped += dropped
            bad_step = int(m.bad_step.to_numpy()[0])
            if bad_step != k.NEVER:
                raise UserError(f"the loss is not a finite number at step {bad_step + 1}: training has stopped",
                                "are the poses and images right? the last checkpoint is from before that step")
            kept_rays = max(int(m.march_counter.to_numpy()[1]), 1)
            loss = float(m.loss.to_numpy()[:now.n_rays].sum() / kept_rays)
            now.seconds = time.perf_counter() - start
            report(progress=now.progress, step=now.step, seconds=now.seconds, loss=loss,
                   psnr=-10.0 * math.log10(max(loss, 1e-10)), n_rays=now.n_rays,
                   samples_per_second=now.samples / now.seconds)
            # The next rays: as many as fill 95 % of the budget if they want what the last ones wanted.
            share = 0.95 * min(batch / max(samples, 1), m.settings["march"] / max(marched, 1))
            now.n_rays = int(min(max(share * (rays_since - dropped), m.settings["block"]), m.settings["rays"]))
            seen, rays_since = totals, 0
            paused = time.perf_counter()
            stop = keep(dict(vars(now)))
            start += time.perf_counter() - paused
    if m.marches:
        pack_occupancy(m, now.step, k.END)                       # nothing is dark: new views may see it
    if m.n_code:
        k.mean_code(m.n_photos, m.n_code, m.first_code, m.params)
    ti.sync()
    return dict(steps=now.step, complete=now.progress >= 1.0, train_seconds=time.perf_counter() - start,
                compile_seconds=compile_seconds, samples=now.samples, rays=now.rays, rays_dropped=now.rays_dropped)


def render_view(m, camera, width, height, lens=0):
    """Render one view: (rgb [height, width, 3] over white, depth [height, width] in world units, inf where empty).

    camera [22] in world units, see k.generate_rays; lens 0 or 1, see k.lens_direction. The image is rendered in tiles
    of as many rays as there are buffers for.
    """
    space = m.space
    n_pixels, tile = width * height, min(m.settings["rays"], m.settings["march"] // 8)
    rgb, depth = np.empty((n_pixels, 3), np.float32), np.empty(n_pixels, np.float32)
    m.view_camera.from_numpy(to_cube(camera[None], space).ravel())
    m.view_size.from_numpy(np.array([0, width, height, lens], np.int32))
    for first in range(0, n_pixels, tile):
        n_rays = min(tile, n_pixels - first)
        k.list_pixels(n_rays, first, m.ray_pixel, m.ray_view)
        MODELS[m.name].draw(m, n_rays)
        pixel = m.pixel.to_numpy()[:4 * n_rays].reshape(n_rays, 4)
        rgb[first:first + n_rays] = pixel[:, :3] + pixel[:, 3:]
        opacity = 1.0 - pixel[:, 3]
        depth[first:first + n_rays] = np.where(opacity > 0.5, m.depth.to_numpy()[:n_rays] / np.maximum(opacity, 0.5),
                                               np.inf) * space.side
    return rgb.reshape(height, width, 3), depth.reshape(height, width)


def psnr(image, truth, counts=True):
    """Peak signal-to-noise ratio in dB of rgb images in [0, 1]; the image is clipped. counts: which pixels do."""
    square = (np.clip(image, 0, 1) - truth) ** 2
    return float(-10.0 * np.log10(np.maximum(np.mean(square, where=counts), 1e-10)))


def ssim(image, truth):
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window, sigma 1.5, K 0.01 / 0.03, mean over channels and
    over the pixels whose window lies inside the image (at least 11x11)."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def blur(x):
        x = sum(w * x[i:x.shape[0] - 10 + i] for i, w in enumerate(window))
        return sum(w * x[:, i:x.shape[1] - 10 + i] for i, w in enumerate(window))

    x, y = np.clip(image, 0, 1).astype(np.float64), truth.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, cov = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    return float(np.mean((2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4)
                         / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))))


def evaluate(m, views, each=lambda i, rgb, depth, truth: None):
    """Render every view and compare: psnr, ssim, psnr_per_view, render_seconds_per_view; `each` gets every picture.
    Pixels that a mask leaves out do not count; of SSIM's image they are those of the truth."""
    psnrs, ssims, seconds = [], [], 0.0
    for i, (_, width, height, lens) in enumerate(views.size):
        start = time.perf_counter()
        rgb, depth = render_view(m, views.camera[i], width, height, lens)
        seconds += time.perf_counter() - start
        rgba = view_image(views, i)
        truth, counts = over_white(rgba), (rgba[..., 3:] == 255) | (views.alpha != "mask")
        psnrs.append(psnr(rgb, truth, counts))
        ssims.append(ssim(np.where(counts, rgb, truth), truth) if min(width, height) >= 11 else float("nan"))
        each(i, rgb, depth, truth)
    return dict(psnr=float(np.mean(psnrs)), ssim=float(np.mean(ssims)), psnr_per_view=psnrs,
                render_seconds_per_view=seconds / len(psnrs))


def evaluate_fitted(m, views, n_steps=50, n_rays=512):
    """PSNR of the right half of each view when its code has been learned from its left half, everything else as it is
    (NeRF in the Wild, section 5): what is left is not exposure or white balance. The mean over the views."""
    neutral, psnrs, rng = m.first_code + m.n_photos * m.n_code, [], np.random.default_rng(0)
    ray_pixel = np.zeros(m.settings["rays"], np.int32)
    for i, (_, width, height, lens) in enumerate(views.size):
        view = select_views(views, np.arange(len(views.size)) == i)
        on_device, n = upload_views(m, view), min(n_rays, m.settings["rays"])
        m.moment.fill(0.0)
        for step in range(n_steps):
            k.list_pixels(n, 0, m.ray_pixel, m.ray_view)
            ray_pixel[:n] = rng.integers(0, height, n) * width + rng.integers(0, max(width // 2, 1), n)
            m.ray_pixel.from_numpy(ray_pixel)
            compare(m, n, on_device, 0, step, neutral)
            k.composite_backward(n, m.ray_span, m.sample, m.rgb_sigma, m.pixel, m.grad_pixel, m.grad_rgb_sigma)
            color_backward(m, neutral)
            adam(m, step + 1, 10.0 * LEARNING_RATE)              # codes are small numbers: see k.CODE_SCALE
        rgb, _ = render_view(m, views.camera[i], width, height, lens)
        rgba, right = view_image(views, i), np.arange(width)[:, None] >= width // 2
        psnrs.append(psnr(rgb, over_white(rgba), right & ((rgba[..., 3:] == 255) | (views.alpha != "mask"))))
        k.mean_code(m.n_photos, m.n_code, m.first_code, m.params)
    return float(np.mean(psnrs))


# ---- Files: the model, pictures, the video --------------------------------------------------------------------------

FORMAT = 2                      # of model.npz and checkpoint.npz
FILE_LIMIT = 2**30              # bytes that such a file may have; reading it takes at most twice as many

# What their info has to say, see believe(); it may come from anyone.
POWERS = {2**i for i in range(4, 25)}
MODEL_INFO = dict(
    scene=str, downscale=(1, 10**9), width=(1, 2**15), height=(1, 2**15), n_levels=(1, N_LEVELS), n_photos=(0, 2**20),
    space=dict(center=3 * [(-1e12, 1e12)], side=(1e-12, 1e12), unbounded=(0, 1), near=(0.0, 1e3)),
    settings=dict(coarsest=(1, 2**16), finest=(1, 2**16), table=POWERS, grid=POWERS & set(range(16, 513)),
                  train_steps=(1, 2**14), render_steps=(1, 2**14)))
CHECKPOINT_INFO = dict(
    MODEL_INFO, seed=(-2**31, 2**31 - 1), views=(0, 2**32), arch={"cpu", "cuda", "vulkan", "metal"}, target=(1e-9, 1e9),
    unit={"steps", "seconds"}, state=dict(
        step=(1, 10**9), progress=(0.0, 1e9), seconds=(0.0, 1e9), cell=(0, 2**27), n_rays=(1, 2**31 - 1),
        samples=(0, 2**62), rays=(0, 2**62), rays_dropped=(0, 2**62)))


@contextlib.contextmanager
def replacing(path):
    """A binary file to write to, which takes the place of `path` once it is complete and on the disk. Should that fail,
    `path` is what it was: UserError."""
    try:
        with open(path + ".part", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".part", path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".part")
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}",
                            "check the folder, its permissions and the free space; an older file there is intact")
        raise
    with contextlib.suppress(OSError):               # the folder's entry, where the system can
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def save_arrays(path, info, **arrays):
    """Write arrays and `info`, a dict for JSON, to an .npz file for read_arrays."""
    with replacing(path) as file:
        np.savez(file, info=np.array(json.dumps(dict(info, format=FORMAT))), **arrays)


def believe(x, schema):
    """Anyone's JSON, cut down to what a schema asks for, and sound. ValueError, KeyError, TypeError ...

    A schema is a dict or list of schemas, a set of values, str, or (least, most) of a number; of a float if least is.
    """
    if isinstance(schema, (dict, list)):
        keys = schema if isinstance(schema, dict) else range(len(schema))
        found = {key: believe(x[key], schema[key]) for key in keys}
        return found if isinstance(schema, dict) else list(found.values())
    if isinstance(schema, set):
        sound = type(x) in (int, str) and x in schema
    elif schema is str:
        sound = isinstance(x, str) and x.isprintable()
    else:
        sound = type(x) in (int, type(schema[0])) and schema[0] <= x <= schema[1]             # NaN is not <=
    if not sound:
        raise ValueError(f"its info has {x!r:.40}")
    return x


def read_member(file, name, dtype, *shape):
    """An array of an open zip file; ValueError unless it is stored as np.savez does, its dtype matches a pattern, and
    it has this shape (None: any number). Nothing is read before it is known how much that will be."""
    entry = file.getinfo(name + ".npy")
    with file.open(entry) as member:
        header = re.fullmatch(rb"\x93NUMPY\x01\x00v\x00\{'descr': '(\S{2,9})', 'fortran_order': False, "
                              rb"'shape': \(([\d, ]*)\), \} *\n", member.read(128))
        if not header or not re.fullmatch(dtype, header[1]):
            raise ValueError(f"{name} is not of the dtype {dtype.decode()}")
        kind, found = np.dtype(header[1].decode()), tuple(int(n) for n in re.findall(rb"\d+", header[2]))
        if len(found) != len(shape) or any(want not in (None, n) for want, n in zip(shape, found)):
            raise ValueError(f"{name} has the shape {found}, not {shape}")
        if entry.compress_type or not entry.compress_size == entry.file_size == 128 + kind.itemsize * math.prod(found):
            raise ValueError(f"{name} is compressed or cut off")
        array = np.frombuffer(member.read(), kind).reshape(found)
    if kind.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} has a number that is not finite")
    return array


def read_arrays(path, machine, training=False):
    """(info, {name: array}) of a model, or of a checkpoint (training), that anyone may have written: no pickle, and
    nothing is read, allocated or believed before it was checked. UserError."""
    if not os.path.isfile(path):
        raise UserError(f"no {path}", "give the folder of a training run, such as runs/lego")
    try:
        with open(path, "rb") as raw:
            size = raw.seek(0, os.SEEK_END)
            raw.seek(max(size - 42, 0))
            tail = raw.read()
            # The last words of a zip file with few members, not of the 64-bit kind
            if not 42 <= size <= FILE_LIMIT or tail[20:24] != b"PK\5\6" or tail[:4] == b"PK\6\7" or (
                    int.from_bytes(tail[32:36], "little") > 4096):
                raise ValueError("it is cut off, too large or of another kind")
            with zipfile.ZipFile(raw) as file:
                info = json.loads(str(read_member(file, "info", rb"<U\d{1,6}")))
                if info.get("format") != FORMAT:
                    newer = type(info.get("format")) is int and info["format"] > FORMAT
                    raise UserError(f"{path} was written by {'a newer' if newer else 'an older'} version",
                                    "use that version, or train again")
                name = believe(info.get("model", "ngp"), set(MODELS))        # models were all of one kind at first
                family = MODELS[name]
                schema = {**(CHECKPOINT_INFO if training else MODEL_INFO), **family.info}
                info = dict(believe(info, schema), model=name)
                m = family.make({**machine_settings(name, machine), **info["settings"]}, None, info["n_photos"],
                                info["n_levels"], dry=True)
                rows, cells = m.n_rows, m.settings["grid"] ** 3
                shapes = dict(params=(b"<f4", rows, k.N_FEATURES), moment=(b"<f4", 2 * rows, k.N_FEATURES),
                              density_grid=(b"<f4", cells), lit_step=(b"<i4", cells),
                              occupancy=(b"<u4", cells // 2048 * 129), camera_train=(b"<f4", None, k.CAMERA),
                              camera_test=(b"<f4", None, k.CAMERA), camera_test_size=(b"<i4", None, 4))
                wanted = m.KEPT if training else [*m.DRAWN, "camera_train", "camera_test", "camera_test_size"]
                shapes = {name: shapes[name] for name in wanted}
                if sorted(file.namelist()) != sorted(name + ".npy" for name in ["info", *shapes]):
                    raise ValueError("it holds other arrays")
                return info, {name: read_member(file, name, *shape) for name, shape in shapes.items()}
    except UserError:
        raise
    except Exception as error:                       # zip, JSON and NumPy each have errors of their own
        raise UserError(f"{path} is not usable: {one_line(error)}", "copy it again, or train again with this version")


def save_model(path, m, info, cameras):
    """Write all that rendering needs to an .npz: the buffers in m.DRAWN, info and cameras (a dict of arrays [n, 22] in
    world units, and of the test views' size [n, 4], stored as camera_<name>)."""
    save_arrays(path, info, **{name: getattr(m, name).to_numpy() for name in m.DRAWN},
                **{f"camera_{name}": camera for name, camera in cameras.items()})


def load_model(folder, machine, training=False):
    """The model of a run folder, ready to render on this machine ("cpu" or "gpu"): (Model, info, cameras)."""
    path = os.path.join(folder, "model.npz")
    info, arrays = read_arrays(path, machine)
    space, cameras = types.SimpleNamespace(**info["space"]), {n[7:]: a for n, a in arrays.items() if n[:7] == "camera_"}
    for camera in (cameras["train"], cameras["test"]):
        pose = to_cube(camera, space)[:, :12].reshape(-1, 3, 4)
        turned = pose[:, :, :3] @ pose[:, :, :3].transpose(0, 2, 1)
        if not (len(pose) and np.abs(pose).max() < 1e6 and np.abs(turned - np.eye(3)).max() < 0.1
                and np.abs(camera).max() < 1e9 and camera[:, 12:14].min() > 1e-6):
            raise UserError(f"{path} has cameras that cannot be", "copy it again, or train again")
    make, settings = MODELS[info["model"]].make, {**machine_settings(info["model"], machine), **info["settings"]}
    arguments = settings, space, info["n_photos"], info["n_levels"], training
    if machine == "cpu":
        check_fits("this model", make(*arguments, dry=True).buffer_mb() + HOST_MB, "close other programs")
    m = make(*arguments)
    for name in m.DRAWN:
        getattr(m, name).from_numpy(arrays[name])
    load_weights(m)
    return m, info, cameras


def to_bytes(image):
    """Image in [0, 1] as u8."""
    return np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def depth_image(depth):
    """Depth [height, width] as a grey picture u8: near is white, far dark grey, empty black."""
    seen = np.isfinite(depth)
    if not seen.any():
        return np.zeros(depth.shape, np.uint8)
    near, far = np.percentile(depth[seen], (1, 99))
    grey = 1.0 - 0.85 * np.clip((depth - near) / max(far - near, 1e-6), 0.0, 1.0)
    return to_bytes(np.where(seen, grey, 0.0))


def nearest_to_axes(cameras):
    """The point [3] nearest to the optical axes of cameras [n, 22]: what they look at."""
    pose = cameras[:, :12].reshape(-1, 3, 4).astype(np.float64)
    origin, forward = pose[:, :, 3], -pose[:, :, 2]
    # sum_n (I - f f^T) (x - origin_n) = 0. A little of the identity keeps it solvable when all axes are parallel.
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    return np.linalg.solve(across.sum(0) + 1e-6 * np.eye(3), (across @ origin[:, :, None]).sum(0)[:, 0]
                           + 1e-6 * (origin.mean(0) + forward.mean(0)))


def orbit_cameras(cameras, n_frames):
    """A closed path [n_frames, 22] fitted to the training cameras [n, 22], in world units; without distortion.

    Where they surround a subject, a circle around it at their mean distance and height, or, where they leave out a
    quarter of it and more, back and forth over the rest; where they face it from one side, an ellipse as wide as they
    are spread, in the plane in which they lie. Every frame looks at the point that is nearest to all their optical
    axes.
    """
    pose = cameras[:, :12].reshape(-1, 3, 4).astype(np.float64)
    origin, forward, up = pose[:, :, 3], -pose[:, :, 2], pose[:, :, 1].mean(0)
    target = nearest_to_axes(cameras)
    up /= np.linalg.norm(up)
    right = np.cross(forward.mean(0), up)
    if np.linalg.norm(right) < 1e-6:
        right = np.cross([1.0, 0.0, 0.0] if abs(up[0]) < 0.9 else [0.0, 1.0, 0.0], up)
    right /= np.linalg.norm(right)
    turn = np.linspace(0.0, 2.0 * np.pi, n_frames, endpoint=False)[:, None]
    facing = np.linalg.norm(forward.mean(0)) > 0.8               # 1: all look the same way; 0: from all around
    if facing:
        spread = np.sqrt(2.0) * (origin - origin.mean(0)).std(0)
        place = origin.mean(0) + np.cos(turn) * right * abs(spread @ right) + np.sin(turn) * up * abs(spread @ up)
    else:
        height = ((origin - target) @ up).mean()
        radius = math.sqrt(max(((origin - target) ** 2).sum(1).mean() - height**2, 1e-6))
        other = np.cross(up, right)
        angle = np.sort(np.arctan2((origin - target) @ other, (origin - target) @ right))
        gap = np.diff(np.append(angle, angle[0] + 2.0 * np.pi))
        if gap.max() > 0.5 * np.pi:
            turn = angle[gap.argmax()] + 0.5 * gap.max() + np.pi + (np.pi - 0.5 * gap.max()) * np.sin(turn)
        place = target + height * up + radius * (np.cos(turn) * right + np.sin(turn) * other)

    path = np.repeat(cameras[:1], n_frames, 0)
    path[:, 16:] = 0.0
    for at, camera in zip(place, path):
        back = (at - target) / np.linalg.norm(at - target)
        side = np.cross(up, back)
        side /= np.linalg.norm(side)
        camera[:12] = np.stack([side, np.cross(back, side), back, at], 1).ravel()
    return path


def resize_camera(camera, old_size, new_size):
    """Camera [22] for another image size (width, height): the same field of view across."""
    camera, scale = camera.copy(), new_size[0] / old_size[0]
    camera[12:16] *= scale
    camera[15] += 0.5 * (new_size[1] - scale * old_size[1])
    return camera


def write_frames(path, frames, n_frames):
    """Frames (an iterable of u8 images) as a video file, or as PNGs in a folder if the name has no ending.

    Without ffmpeg a .gif stands in for .mp4. Returns the path written.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in ("", ".mp4", ".gif"):
        raise UserError(f"cannot write a video as {path}", "end the name in .mp4 or .gif, or give a folder for PNGs")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with progress_bar("render") as bar:
        task = bar.add_task("render", total=n_frames, note="")
        if ending == "":
            os.makedirs(path, exist_ok=True)
            for i, frame in enumerate(frames):
                imageio.imwrite(os.path.join(path, f"{i:04d}.png"), frame)
                bar.update(task, advance=1)
            return path
        if ending == ".mp4":
            try:
                import imageio_ffmpeg
                imageio_ffmpeg.get_ffmpeg_exe()
            except (ImportError, RuntimeError):
                path = path[:-4] + ".gif"
                print(f"no ffmpeg here: writing {path} instead (pip install 'imageio[ffmpeg]' brings it)")
        images = []
        for frame in frames:
            images.append(frame[:frame.shape[0] // 2 * 2, :frame.shape[1] // 2 * 2])     # H.264 wants even sizes
            bar.update(task, advance=1)
    part = os.path.splitext(path)[0] + ".part" + os.path.splitext(path)[1]
    if path.endswith(".mp4"):
        imageio.imwrite(part, images, fps=24, codec="libx264", quality=8, macro_block_size=2, plugin="FFMPEG")
    else:
        imageio.imwrite(part, images, duration=1000 / 24, loop=0)
    os.replace(part, path)
    return path


# ---- Command line ---------------------------------------------------------------------------------------------------

def machine_settings(name, machine, unbounded=0):
    """The settings of a model on a machine."""
    return {**MACHINES[machine], **MODELS[name].settings.get(machine, {}), **(UNBOUNDED[machine] if unbounded else {})}


def count_photos(name, scene):
    """How many photographs get codes."""
    return len(scene.train.size) if scene.capture or MODELS[name].make is WildModel else 0


def check_model(name, space):
    """UserError if a model cannot do what a scene asks for."""
    if space.unbounded and not MODELS[name].make.marches:
        raise UserError(f"--model {name} knows only scenes in a box, and this one has no end",
                        "use --model ngp, or an aabb_scale of 1 in transforms.json")


def start_taichi(arch):
    """Start Taichi on "cpu", "cuda", "vulkan", "metal", or the best of them ("auto"): (arch, device name).

    auto takes CUDA, then a Vulkan or Metal GPU, then the CPU. UserError if an arch that was asked for is missing.
    """
    gc.collect()           # A buffer that outlives its Taichi takes another one's memory along when it goes
    choices = [arch] if arch != "auto" else ["cuda", "metal" if sys.platform == "darwin" else "vulkan", "cpu"]
    if arch == "auto" and sys.platform == "linux" and not os.path.exists("/dev/dri"):
        choices.remove("vulkan")                     # no GPU: what Vulkan would find is a renderer in software
    for choice in choices:
        # Matrices as LLVM vectors: weight gradients several times as fast on a CPU; SPIR-V cannot take them.
        options = dict(real_matrix_scalarize=choice != "cpu", unrolling_limit=0)
        sys.stdout.flush()
        with tempfile.TemporaryFile("w+") as log:    # only Taichi's trace says which device it found
            saved = os.dup(1), os.dup(2)
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                ti.init(arch=getattr(ti, choice), enable_fallback=False, log_level=ti.TRACE, **options)
                started = True
            except RuntimeError:
                started = False
            finally:
                sys.stdout.flush()
                for fd in (1, 2):
                    os.dup2(saved[fd - 1], fd)
                    os.close(saved[fd - 1])
            log.seek(0)
            found = re.search(r'Vulkan Device "(.*?)" supports|CUDA [Dd]evice \[.*?\]:? *(.*)', log.read())
        ti.set_logging_level(ti.WARN)
        device = next((name for name in found.groups() if name), "unknown") if found else "unknown"
        in_software = re.search("llvmpipe|lavapipe|swiftshader|basic render", device.lower())
        if started and not (arch == "auto" and choice == "vulkan" and (in_software or device == "unknown")):
            return choice, cpu_name() if choice == "cpu" else device
    raise UserError(f"--arch {arch} is not to be had on this machine", "--arch auto takes the best that there is")


def cpu_name():
    """What the operating system calls the processor, and the number of its cores."""
    name = platform.processor() or platform.machine() or "unknown"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = re.search(r"model name\s*: (.*)", file.read()).group(1)
    except (OSError, AttributeError):
        pass
    return f"{name}, {os.cpu_count()} cores"


def peak_memory_mb():
    """Largest memory of this process so far in MB (10^6 bytes), or None where Python cannot tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def free_mb():
    """Memory that is free in MB (10^6 bytes), or all there is; None where Python cannot tell (Windows)."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return int(re.search(r"MemAvailable: *(\d+)", file.read())[1]) * 1024 / 1e6
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6 if sys.platform == "darwin" else None


def check_fits(what, need, hint):
    """UserError if something needs more memory, in MB, than is free."""
    free = free_mb()
    if free is not None and need > free:
        raise UserError(f"{what} needs {need:.0f} MB of memory, and this machine has {free:.0f} MB free", hint)


def progress_bar(text):
    """A rich progress bar, silent where the output is not a terminal."""
    columns = (rich.progress.TextColumn(text), rich.progress.BarColumn(), rich.progress.TaskProgressColumn(),
               rich.progress.TextColumn("{task.fields[note]}"), rich.progress.TimeRemainingColumn())
    return rich.progress.Progress(*columns, disable=not sys.stdout.isatty(), transient=True)


def run_folder(out, scene, overwrite):
    """The folder that this run will write to: `out`, or the next free runs/<scene>, runs/<scene>-2 and so on."""
    if out is None:
        name = os.path.basename(os.path.abspath(scene))
        out, number = os.path.join("runs", name), 1
        while os.path.exists(out):
            number += 1
            out = os.path.join("runs", f"{name}-{number}")
    elif os.path.exists(out):
        is_run = os.path.isdir(out) and (not os.listdir(out) or os.path.exists(os.path.join(out, "log.csv")))
        if not overwrite:
            raise UserError(f"{out} exists", "choose another --out, or replace it with --overwrite")
        if not is_run:
            raise UserError(f"{out} exists and is no run folder: it will not be overwritten", "choose another --out")
    return out


def command_train(args):
    """tinynerf.py train: from a scene's folder to a run folder."""
    out, old, resume = args.resume, {}, None
    if args.resume:
        path = os.path.join(out, "checkpoint.npz")
        if not os.path.exists(path) and os.path.exists(os.path.join(out, "metrics.json")):
            raise UserError(f"{out} is complete: there is nothing to go on with", "train longer into another --out")
        old, arrays = read_arrays(path, "cpu", training=True)
        args.scene, args.downscale, args.seed = args.scene or old["scene"], old["downscale"], old["seed"]
        args.arch, args.model, resume = args.arch or old["arch"], old["model"], (old["state"], arrays)
    else:
        out = run_folder(args.out, args.scene, args.overwrite)
    start = time.perf_counter()
    scene = load_scene(args.scene, args.downscale)
    space, (_, width, height, _) = place_scene(scene), scene.train.size[0]
    for line in scene.skipped:
        print(f"{args.scene}: {line}")
    print(f"{args.scene}: {len(scene.train.size)} training views, {len(scene.test.size)} held out ({scene.split}), "
          f"{width}x{height}, read in {time.perf_counter() - start:.1f} s")
    n_photos, checksum = count_photos(args.model, scene), zlib.crc32(scene.train.size.tobytes())
    if resume:
        if (n_photos, checksum) != (old["n_photos"], old["views"]):
            raise UserError(f"{args.scene} is not what {out} is trained on: it has other views or sizes",
                            "where has that folder moved? train SCENE --resume RUN takes it from there")
        space = types.SimpleNamespace(**old["space"])
    check_model(args.model, space)
    x, y, z = space.center
    print(f"placed around ({x:.3g}, {y:.3g}, {z:.3g}): " + (
        f"a ball of radius {space.side * k.RADIUS:.3g}, and contracted what is beyond" if space.unbounded else
        f"a box with sides of {space.side:.3g}"))
    arch, device = start_taichi(args.arch)
    machine = "cpu" if arch == "cpu" else "gpu"
    settings = {**machine_settings(args.model, machine, space.unbounded), **old.get("settings", {})}
    print(f"tinynerf {VERSION} on {arch} ({device}), Taichi {'.'.join(map(str, ti.__version__))}")
    target, unit = (old["target"], old["unit"]) if old else next(
        (source[unit], unit) for source in (vars(args), settings) for unit in ("steps", "seconds") if source.get(unit))
    make, images = MODELS[args.model].make, scene.train.pixels.nbytes / 1e6
    plan = make(settings, space, n_photos, dry=True)
    buffers = plan.buffer_mb() + images              # and a checkpoint on its way to the disk
    need = buffers + (48 * plan.n_rows + 4 * settings["grid"] ** 3) / 1e6 + HOST_MB
    print(f"needs {need:.0f} MB of memory, {buffers:.0f} MB of them for buffers, {images:.0f} MB of these for images")
    if arch == "cpu":
        check_fits("this run", need, "use a larger --downscale" if 2 * images > buffers else "close other programs")
    m = make(settings, space, n_photos)
    views = upload_views(m, scene.train)
    info = dict(version=VERSION, model=m.name, scene=os.path.abspath(args.scene), downscale=args.downscale,
                n_levels=m.n_levels, n_photos=m.n_photos, space=vars(space), width=int(width), height=int(height),
                split=scene.split,
                settings={name: settings[name] for name in {**MODEL_INFO, **MODELS[m.name].info}["settings"]})

    interrupted = []                                 # by Ctrl-C, the first of which is only noted

    def interrupt(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    os.makedirs(out, exist_ok=True)
    log_path, rows = os.path.join(out, "log.csv"), []
    if resume and os.path.exists(log_path):          # go on behind the checkpoint's row; a killed run went further
        with open(log_path, newline="", encoding="utf-8", errors="replace") as file:
            found = ((row, re.match("([0-9]{1,9}),", row)) for row in file)
            rows = [row for row, match in found if match and int(match[1]) <= old["state"]["step"]]
    with open(log_path, "w", newline="", encoding="utf-8") as log_file, progress_bar("train ") as bar:
        log_file.writelines(["step,seconds,loss,psnr\r\n"] + rows)
        log = csv.writer(log_file)
        task, printed, saved = bar.add_task("train", total=1.0, note=""), [0.0], [time.monotonic()]

        def report(progress, step, seconds, loss, psnr, samples_per_second, n_rays):
            log.writerow([step, f"{seconds:.3f}", f"{loss:.6g}", f"{psnr:.3f}"])
            note = f"step {step}  psnr {psnr:5.2f} dB  {samples_per_second / 1e6:.2f} M samples/s"
            bar.update(task, completed=progress, note=note)
            if bar.disable and seconds >= printed[0]:
                printed[0] = seconds + 10.0
                print(f"{note}  {seconds:.0f} s", flush=True)

        def keep(state):
            """A checkpoint after the first step, now and then, and at the end."""
            if (state["step"] == 1 or time.monotonic() > saved[0] + CHECKPOINT_SECONDS or interrupted
                    or state["progress"] >= 1.0):
                kept = {name: getattr(m, name).to_numpy() for name in m.KEPT}
                if not all(np.isfinite(array).all() for array in kept.values()):
                    raise UserError(f"the model is not finite at step {state['step']}: training has stopped",
                                    "are the poses and images right? the last checkpoint is from before that step")
                log_file.flush()
                save_arrays(os.path.join(out, "checkpoint.npz"), dict(
                    info, seed=args.seed, views=checksum, target=target, unit=unit, arch=arch, state=state), **kept)
                saved[0] = time.monotonic()
            return bool(interrupted)

        signal.signal(signal.SIGINT, interrupt)
        try:
            total = train(m, views, args.seed, **{unit: target}, report=report, keep=keep, resume=resume)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if not total["complete"]:
        print(f"interrupted at step {total['steps']}: 'train --resume {out}' goes on; the result so far follows")
    cameras = dict(train=scene.train.camera, test=scene.test.camera, test_size=scene.test.size)
    save_model(os.path.join(out, "model.npz"), m, info, cameras)

    buffer_mb = m.buffer_mb()
    metrics = measure(m, scene.test, out)
    metrics.update(buffer_mb=buffer_mb, split=scene.split, steps=total["steps"], train_seconds=total["train_seconds"],
                   compile_seconds=total["compile_seconds"],
                   samples_per_second=total["samples"] / total["train_seconds"],
                   rays_per_second=total["rays"] / total["train_seconds"], rays_dropped=total["rays_dropped"])
    path = orbit_cameras(scene.train.camera, settings["frames"])
    write_frames(os.path.join(out, "orbit.mp4"), (to_bytes(render_view(m, camera, width, height)[0])
                                                  for camera in path), len(path))
    metrics.update(peak_memory_mb=peak_memory_mb(), arch=arch, device=device, seed=args.seed,
                   taichi=".".join(map(str, ti.__version__)), version=VERSION)
    with replacing(os.path.join(out, "metrics.json")) as file:
        file.write(json.dumps(metrics, indent=1).encode())
    if total["complete"]:
        os.remove(os.path.join(out, "checkpoint.npz"))
    print(f"| scene | PSNR | SSIM | views | size | steps | train s | compile s | M samples/s | s per view | machine |\n"
          f"|---|---|---|---|---|---|---|---|---|---|---|\n"
          f"| {os.path.basename(os.path.abspath(args.scene))} | {metrics['psnr']:.2f} dB | {metrics['ssim']:.4f} "
          f"| {metrics['n_views']} {scene.split}, white | {width}x{height} | {total['steps']} "
          f"| {total['train_seconds']:.1f} | {total['compile_seconds']:.1f} "
          f"| {metrics['samples_per_second'] / 1e6:.2f} | {metrics['render_seconds_per_view']:.2f} "
          f"| {arch}, {device} |")
    print(f"{total['rays_dropped']} of {total['rays'] + total['rays_dropped']} rays dropped; "
          f"{metrics['buffer_mb']:.0f} MB of buffers; everything is in {out}")


def measure(m, views, out=None):
    """Evaluate the held-out views into the metrics that train and eval share; with `out`, leave the pictures there:
    test/*.png, compare.png (truth | render | error, three views) and depth.png."""
    n = len(views.size)
    rows, shown = [], {0, n // 3, 2 * n // 3}
    with progress_bar("test  ") as bar:
        task = bar.add_task("test", total=n, note="")

        def each(i, rgb, depth, truth):
            if out is not None:
                imageio.imwrite(os.path.join(out, "test", f"{i:03d}.png"), to_bytes(rgb))
                if i in shown and tuple(views.size[i, 1:3]) == tuple(views.size[0, 1:3]):
                    rows.append(np.concatenate([truth, np.clip(rgb, 0, 1), np.abs(np.clip(rgb, 0, 1) - truth)], 1))
                if i == 0:
                    imageio.imwrite(os.path.join(out, "depth.png"), depth_image(depth))
            bar.update(task, advance=1)

        if out is not None:
            shutil.rmtree(os.path.join(out, "test"), ignore_errors=True)     # of a run that this one overwrites
            os.makedirs(os.path.join(out, "test"))
        metrics = evaluate(m, views, each)
        if m.n_code:
            metrics["psnr_fitted"] = evaluate_fitted(m, views)
            print(f"{metrics['psnr_fitted']:.2f} dB on the views' right halves, their codes fitted to the left halves")
    if out is not None:
        imageio.imwrite(os.path.join(out, "compare.png"), to_bytes(np.concatenate(rows)))
    return dict(metrics, n_views=n, image_size=views.size[0, 1:3].tolist(), background="white")


def command_render(args):
    """tinynerf.py render: a video, or PNGs, from a run folder."""
    arch, device = start_taichi(args.arch)
    m, info, cameras = load_model(args.run, "cpu" if arch == "cpu" else "gpu")
    out = args.out or os.path.join(args.run, "render.mp4" if args.path == "orbit" else "render_test")
    size = args.size or (info["width"], info["height"])
    if args.path == "test":
        path, sizes = cameras["test"][:args.frames], cameras["test_size"][:, 1:].tolist()
        own_size = not args.size and not os.path.splitext(out)[1]            # frames of a video are of one size
    else:
        path, own_size = orbit_cameras(cameras["train"], args.frames or 96), False
        sizes = [(info["width"], info["height"], 0)] * len(path)

    def render(camera, width, height, lens):
        new_size = (width, height) if own_size else size
        return to_bytes(render_view(m, resize_camera(camera, (width, height), new_size), *new_size, lens)[0])

    frames = (render(camera, *old) for camera, old in zip(path, sizes))
    start = time.perf_counter()
    out = write_frames(out, frames, len(path))
    seconds = (time.perf_counter() - start) / len(path)
    print(f"{len(path)} frames in {out}, {seconds:.2f} s a frame on {arch} ({device})")


def command_eval(args):
    """tinynerf.py eval: measure a run folder's model on the held-out views again; changes nothing."""
    arch, device = start_taichi(args.arch)
    m, info, _ = load_model(args.run, "cpu" if arch == "cpu" else "gpu", training=True)
    scene = load_scene(args.scene or info["scene"], info["downscale"])
    metrics = measure(m, scene.test)
    width, height = metrics["image_size"]
    print(f"{metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f} on {metrics['n_views']} views ({scene.split}, white "
          f"background, {width}x{height}), {metrics['render_seconds_per_view']:.2f} s a view "
          f"on {arch} ({device})")


def median_seconds(function, repeats=15):
    """Median wall time of function(), after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def measure_floors(m):
    """What this machine can do at best, by NumPy on all cores: FLOP/s of a product, [2^15, 64] times [64, 64]; bytes/s
    of a copy, read and written; bytes/s of a gather of random rows of the hash table, read."""
    rng, n_threads = np.random.default_rng(0), os.cpu_count() or 1
    x, weight = rng.random((2**15, k.WIDTH), np.float32), rng.random((k.WIDTH, k.WIDTH), np.float32)
    y, big = np.empty_like(x), rng.random((n_threads, 2**22), np.float32)
    copy, table = np.empty_like(big), rng.random((m.settings["table"], k.N_FEATURES), np.float32)
    index = rng.integers(0, len(table), (n_threads, 2**17))
    rows = np.empty(index.shape + (k.N_FEATURES,), np.float32)
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        return dict(
            product=2 * x.size * k.WIDTH / median_seconds(lambda: np.matmul(x, weight, out=y)),
            copy=2 * big.nbytes / median_seconds(lambda: list(pool.map(np.copyto, copy, big))),
            gather=rows.nbytes / median_seconds(lambda: list(pool.map(
                lambda i, out: np.take(table, i, axis=0, out=out, mode="clip"), index, rows))))


def step_work(m, rays, marched, kept):
    """What a training step asks of each kernel: {name: (floor, amount)}, FLOPs of products or bytes that must be read
    and written at least. Marching and random numbers are counted by their bytes, although they mostly compute."""
    forward = sum(2 * k.WIDTH * count_rows(net.n_in, net.n_hidden, net.n_out) for net in m.mlps)
    corners = 8 * m.n_levels * 4 * k.N_FEATURES                                  # bytes of table per sample
    work = dict(
        pick_pixels=("copy", 4 * rays), generate_rays=("copy", 60 * rays), count_samples=("copy", 44 * rays),
        sum_counts=("copy", 16 * rays), scan_blocks=("copy", 16 * rays // m.settings["block"]),
        claim_spans=("copy", 24 * rays), write_samples=("copy", 48 * rays + 16 * marched),
        hash_encode_forward=("gather", corners * marched),
        probe_density=("product", 2 * k.WIDTH * (MLPS["density"][0] + 1) * marched),
        mark_visible_samples=("copy", 16 * rays + 24 * marched),
        mark_lit_cells=("copy", 8 * rays + 28 * kept),
        keep_visible_samples=("copy", 16 * rays + 20 * marched + (20 + 4 * 2 * k.WIDTH) * kept),
        mlp_forward=("product", forward * kept), density_head_forward=("copy", 68 * kept),
        color_input_forward=("copy", 196 * kept), color_head_forward=("copy", 80 * kept),
        composite_forward=("copy", 80 * rays + 32 * kept), loss_and_gradient=("copy", 48 * rays),
        composite_backward=("copy", 40 * rays + 48 * kept), color_head_backward=("copy", 96 * kept),
        mlp_backward_input=("product", forward * kept), mlp_backward_weight=("product", forward * kept),
        density_head_backward=("copy", 224 * kept), hash_encode_backward=("gather", 2 * corners * kept),
        sum_partials=("copy", 4 * m.n_weights * (kept // m.settings["chunk"] + 2)),
        adam_step=("copy", 4 * k.N_FEATURES * m.n_rows), load_weights=("copy", 12 * m.n_weights))
    if m.space.unbounded:
        work.update(contract_samples=("copy", 24 * marched), distortion_forward=("copy", 20 * rays + 12 * kept),
                    distortion_backward=("copy", 20 * rays + 20 * kept))
    if m.name == "nerfw":
        del work["composite_backward"]
        work.update(transient_head_forward=("copy", 84 * kept), transient_head_backward=("copy", 104 * kept),
                    composite_both_forward=("copy", 24 * rays + 40 * kept),
                    composite_both_backward=("copy", 40 * rays + 76 * kept), uncertainty_forward=("copy", 12 * kept),
                    uncertainty_backward=("copy", 16 * rays + 28 * kept), weigh_by_uncertainty=("copy", 44 * rays),
                    transient_input_backward=("copy", 192 * kept))
    if m.n_code:
        work.update(code_backward=("copy", 4 * (1 + m.n_code) * kept))
    return work


def sampled_work(m, rays, coarse, fine):
    """step_work() of the models that sample."""
    n, net, rays, family = coarse + fine, m.nets[0], 2 * rays, MODELS[m.name]            # two levels
    mlps = sum(2 * k.WIDTH * count_rows(mlp.n_in, mlp.n_hidden, mlp.n_out) for mlp in (net.density, net.color))
    n_layers = sum(k.WIDTH * layer.n_out * (layer.n_x + k.WIDTH * layer.n_h) for layer in net.layers)
    n_first = sum(k.WIDTH * layer.n_out * layer.n_x for layer in net.layers)             # have no gradient to hand on
    return dict(
        pick_pixels=("copy", 2 * rays), generate_rays=("copy", 60 * rays), count_even=("copy", 12 * rays),
        sum_counts=("copy", 4 * rays), scan_blocks=("copy", 8 * rays // m.settings["block"]),
        claim_spans=("copy", 12 * rays), sample_even=("copy", 20 * rays + 24 * coarse),
        weigh_samples=("copy", 4 * rays + 12 * coarse),
        sample_where_light_is=("copy", 24 * rays + 24 * coarse + 24 * fine),
        **(dict(widen_weights=("copy", 4 * rays + 8 * coarse), weigh_loss=("copy", 16 * rays)) if family.cones else {}),
        **{family.encoding + "_forward": ("copy", 4 * (3 + k.WIDTH) * n)}, layer_forward=("product", 2 * n_layers * n),
        mlp_forward=("product", mlps * n), direction_input_forward=("copy", 4 * (17 + net.color.n_in) * n),
        **{family.density + "_forward": ("copy", 8 * n), family.density + "_backward": ("copy", 136 * n)},
        **{family.color + "_forward": ("copy", 24 * n), family.color + "_backward": ("copy", 36 * n)},
        composite_forward=("copy", 48 * rays + 24 * n), loss_and_gradient=("copy", 48 * rays),
        composite_backward=("copy", 40 * rays + 36 * n), mlp_backward_input=("product", mlps * n),
        mlp_backward_weight=("product", mlps * n), relu_backward=("copy", 12 * k.WIDTH * n),
        layer_backward_input=("product", 2 * (n_layers - n_first) * n),
        layer_backward_weight=("product", 2 * n_layers * n),
        sum_partials=("copy", 4 * net.n_weights * (n // m.settings["chunk"] + 4)),
        adam_step=("copy", 28 * k.N_FEATURES * m.n_rows), load_weights=("copy", 12 * len(m.mlps) // 2 * mlps // 2),
        load_layer=("copy", 12 * len(m.nets) * n_layers))


def command_bench(args):
    """tinynerf.py bench: train for a while, then time every kernel of a step against what the machine can do."""
    scene = load_scene(args.scene, args.downscale)
    arch, device = start_taichi(args.arch)
    machine, space = "cpu" if arch == "cpu" else "gpu", place_scene(scene)
    check_model(args.model, space)
    settings = machine_settings(args.model, machine, space.unbounded)
    m = MODELS[args.model].make(settings, space, count_photos(args.model, scene))
    on_device, line, refresh = upload_views(m, scene.train), {}, settings["refresh"]
    train(m, on_device, 0, steps=args.steps, report=lambda **now: line.update(now))
    rays = line["n_rays"]

    def step():
        MODELS[m.name].step(m, rays, on_device, 0, line["step"], FINAL_RATE)
        ti.sync()

    def update():
        if m.marches:
            update_occupancy(m, min(settings["batch"], settings["grid"]**3), 0, 0, line["step"])
            ti.sync()

    if m.marches:
        pack_occupancy(m, line["step"], DARK_AFTER)  # as it is while training goes on

    step_seconds, update_seconds = median_seconds(step, 31), median_seconds(update)
    marched, kept = int(m.march_counter.to_numpy()[0]), int(m.counter.to_numpy()[0])
    seconds, plain = {}, {name: kernel for name, kernel in vars(k).items() if hasattr(kernel, "_is_wrapped_kernel")}

    def timed(name):
        def launch(*arguments):
            start = time.perf_counter()
            plain[name](*arguments)
            ti.sync()
            seconds[name][-1] += time.perf_counter() - start
        return launch

    for name in plain:
        setattr(k, name, timed(name))
    for _ in range(31):
        for name in plain:
            seconds.setdefault(name, []).append(0.0)
        step()
    for name, kernel in plain.items():
        setattr(k, name, kernel)
    seconds = {name: float(np.median(times)) for name, times in seconds.items()}

    floors, work = measure_floors(m), (step_work if m.marches else sampled_work)(m, rays, marched, kept)
    first, second = ("marched", "kept") if m.marches else ("coarse", "fine")
    print(f"{arch} ({device}), {args.scene} after {line['step']} steps: {rays} rays, {marched} samples {first}, "
          f"{kept} {second}\nfloors, by NumPy on the CPU: product {floors['product'] / 1e9:.0f} GFLOP/s, copy "
          f"{floors['copy'] / 1e9:.1f} GB/s, gather {floors['gather'] / 1e9:.1f} GB/s\n\n"
          f"| kernel | ms | share | rate | floor, ms | ratio |\n|---|---|---|---|---|---|")
    total, floor_total = sum(seconds.values()), 0.0
    for name, (kind, amount) in sorted(work.items(), key=lambda item: -seconds[item[0]]):
        floor, unit = amount / floors[kind], "GFLOP/s" if kind == "product" else "GB/s"
        floor_total += floor
        print(f"| {name} | {1e3 * seconds[name]:.2f} | {seconds[name] / total:.1%} "
              f"| {amount / seconds[name] / 1e9:.1f} {unit} | {1e3 * floor:.2f} | {seconds[name] / floor:.1f} |")
    whole = step_seconds + update_seconds / refresh
    print(f"\nstep {1e3 * step_seconds:.1f} ms ({1e3 * total:.1f} ms one kernel at a time), "
          f"{step_seconds / floor_total:.2f} times the sum of the floors, {1e3 * floor_total:.1f} ms\n"
          f"update of the occupancy grid {1e3 * update_seconds:.1f} ms, every {refresh} steps\n"
          f"{rays / whole / 1e6:.3f} M rays/s, {marched / whole / 1e6:.2f} M samples/s {first}, "
          f"{kept / whole / 1e6:.2f} M samples/s forward and backward")
    _, width, height, lens = scene.test.size[0]
    times = [median_seconds(lambda: render_view(m, camera, width, height, lens), 3)
             for camera in scene.test.camera[::max(1, len(scene.test.camera) // 5)][:5]]
    print(f"a {width}x{height} view {np.median(times):.3f} s (median of {len(times)})")


def parse_args(argv):
    """The command line as a namespace; UserError for what does not parse."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message, f"see {self.prog} --help")

    def positive(kind):
        def parse(text):
            value = kind(text)
            if not 0 < value < 1e9:
                raise argparse.ArgumentTypeError(f"{text} is not a positive number")
            return value
        return parse

    def seed(text):
        if not -2**31 <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"{text} does not fit into 32 bits")
        return int(text)

    def size(text):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
        if not match or not int(match[1]) or not int(match[2]):
            raise argparse.ArgumentTypeError(f"{text} is not a size like 800x600")
        return int(match[1]), int(match[2])

    parser = Parser(prog="tinynerf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | render | eval | bench")
    parser_train = commands.add_parser("train", help="train on a scene and leave a run folder")
    parser_train.add_argument("scene", nargs="?", help="folder with transforms_train.json and images")
    parser_train.add_argument("--model", choices=MODELS, help="which member of the family (default: ngp)")
    parser_train.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted or killed")
    parser_train.add_argument("--out", help="run folder (default: the next free runs/SCENE)")
    length = parser_train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive(int), help="train for so many steps; repeats exactly on a CPU")
    length.add_argument("--seconds", type=positive(float), help="train for so long (default on a CPU: 90)")
    parser_train.add_argument("--downscale", type=positive(int), metavar="K", help="average KxK pixels")
    parser_train.add_argument("--seed", type=seed, help="of every random number")
    parser_train.add_argument("--overwrite", action="store_true", default=None,
                              help="replace the run folder --out if it exists")
    parser_render = commands.add_parser("render", help="render a trained model")
    parser_render.add_argument("run", help="run folder")
    parser_render.add_argument("--path", choices=("orbit", "test"), default="orbit", help="which cameras")
    parser_render.add_argument("--frames", type=positive(int), help="how many (default: 96, or all test views)")
    parser_render.add_argument("--size", type=size, metavar="WxH", help="image size (default: the training images')")
    parser_render.add_argument("--out", help=".mp4, .gif or a folder for PNGs (default: in the run folder)")
    parser_eval = commands.add_parser("eval", help="measure a trained model on its held-out views")
    parser_eval.add_argument("run", help="run folder")
    parser_eval.add_argument("--scene", help="folder of the scene, if it has moved")
    parser_bench = commands.add_parser("bench", help="time every kernel against what the machine can do")
    parser_bench.add_argument("scene", nargs="?", default="data/lego", help="folder of a scene (default: data/lego)")
    parser_bench.add_argument("--model", choices=MODELS, default="ngp", help="of what (default: ngp)")
    parser_bench.add_argument("--steps", type=positive(int), default=600, help="train for so many steps first")
    parser_bench.add_argument("--downscale", type=positive(int), default=1, metavar="K", help="average KxK pixels")
    for command in (parser_train, parser_render, parser_eval, parser_bench):
        command.add_argument("--arch", choices=("auto", "cpu", "cuda", "vulkan", "metal"))
    args = parser.parse_args(argv)
    if args.command == "train":
        for name in ("model", "out", "steps", "seconds", "downscale", "seed", "overwrite"):
            if args.resume and vars(args)[name] is not None:
                parser_train.error(f"argument --{name}: not allowed with --resume, which goes on as the run began")
        if not args.resume and not args.scene:
            parser_train.error("the following arguments are required: scene")
        args.model, args.downscale, args.seed = args.model or "ngp", args.downscale or 1, args.seed or 0
    if args.arch is None and not vars(args).get("resume"):           # a run goes on where it began
        args.arch = "auto"
    return args


def main(argv=None):
    """Run a command; returns the exit code: 0, or 2 for a mistake of the user."""
    try:
        args = parse_args(argv)
        commands = {"train": command_train, "render": command_render, "eval": command_eval, "bench": command_bench}
        commands[args.command](args)
    except UserError as error:
        print(f"tinynerf: {error}\n          {error.hint}", file=sys.stderr)
        return 2
    except OSError as error:                         # a full disk, a folder that may not be written to
        print(f"tinynerf: {one_line(error)}\n          check the path, its permissions and the free space",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tinynerf: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
