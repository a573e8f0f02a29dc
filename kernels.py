"""Every kernel of tinynerf, in the order in which a ray meets them; each forward is followed by its backward.

    pixel -> ray -> march -> sample (-> contraction) -> hash grid -> visible samples -> density MLP -> sigma, geometry
                                     direction + geometry (+ code of the photograph) -> color MLP -> rgb
    rgb, sigma -> volume rendering -> loss, and back: loss -> rendering -> MLPs -> hash grid -> Adam

Rules that hold for the whole file:
  1. Buffers are flat f32, i32 or u32 arrays. A shape like [n, 4] means row-major: x[4*i + c].
     Only parameters, copies of them, their gradients and moments, and the MLPs' activations are arrays of vectors, one
     row an element: x[i][c]. In memory the rows lie one after the other, 4-byte numbers without gaps. No kernel has
     more than 8 buffers, which is what WebGPU binds.
  2. A kernel is one parallel loop. The loop index is the thread id, plus the loop's first index where that is not 0;
     threads of one launch do not communicate.
  3. Launches run in order, and all writes of one are visible to the next. There is no other synchronisation.
  4. grad_x has the shape of x. Gradients of parameters accumulate (+=) from clear_gradients on, all others are
     overwritten (=), unless the docstring calls them in-out.
  5. A buffer entry has one writer per launch, except where the docstring has an 'atomic' line.
  6. The scene's box is the unit cube: positions are in [0, 1]^3, and lengths and 1/sigma are in units of its side. An
     unbounded scene is all of space, bent into the cube by `contract`; its lengths are those before bending.
  7. Indices are i32: n_levels * samples, the pixels of all views, 4 * slots of the table, 8 * rays, `first` + n and, in
     crop_views, cells * views stay below 2^31.
  8. It reads as Python: x & 1 == 1 is (x & 1) == 1, and a <= x < b both. Literals with a point are f32; // and % meet
     no negative numbers. Where i32 and f32 meet, the i32 is converted first; / is always f32. A number meets each
     component of a vector. Compilers may contract products and sums, and reorder sums. u32 is modulo 2^32; counter[2]
     and counter[3], which wrap around, too.
Part II, at the end, holds stages of other models than instant-ngp; a reader may stop before it.
Nothing here uses autodiff, 64-bit or 16-bit types, shared memory, subgroups, recursion or captured state.

Index letters: r ray, v view, i sample, k step or sample along a ray, l level, j input and o output of a layer,
c component, t thread (and distance along a ray, where there is one), b block.
Counts are made on the device, in buffers `counter` [4] i32: one of the samples that are marched, one of those that are
kept, one of the live cells of the occupancy grid, one of the cells that an update of the grid looks at. Each holds
    [0] n_samples, the samples in the buffers now, at most their capacity     [1] rays that got their samples
    running totals: [2] rays dropped because no room was left (scan_blocks)   [3] samples
"thread one per sample" means counter[0] threads: elsewhere, launch `capacity` threads and return where i >= counter[0].
"""
import taichi as ti

WIDTH = 64            # neurons of a hidden layer, and the most inputs any layer of an MLP has
OUTPUT = 16           # most outputs an MLP has: the density MLP's; the color MLP has 3
N_FEATURES = 4        # F: features of a hash-table slot, and numbers in a row of the parameters
UNKNOWN = 1e9         # density of a cell that nobody has looked at yet: it counts as occupied
FOOTPRINT = 4096      # most pixels of a view that are looked at for a cell
CARVED_BY = 3         # views that have to see nothing in a cell before it is given up: the first such in their list
END = 1 << 30         # step index of a ray that has left the box, or that no light gets through any more
DARK = END + 1        # step index of a ray that has ended in a dark cell
NEVER = 2**31 - 1     # the first step whose loss is no finite number, while there is none
RADIUS = 0.25         # of the ball in the middle of the cube that the contraction leaves as it is
FAR = 25.0            # where rays of an unbounded scene end, in sides of the cube
CODE_SCALE = 0.05     # of photographs' codes where they enter an MLP
NEUTRAL_EVERY = 8     # one of so many training rays has the neutral code
CAMERA = 22           # numbers of a camera: see generate_rays
LENS_TOLERANCE = 1e-6  # to which a lens is inverted, in units of the focal length
T_STOP = 1e-3         # a ray ends when less than this share of light reaches its next sample (instant-ngp: 1e-4)
RAW_SIGMA_MAX = 15.0  # exp() is guarded above this: e^15 per box side is opaque within one step

vec3 = ti.types.vector(3, ti.f32)
vec8 = ti.types.vector(8, ti.f32)
uvec8 = ti.types.vector(8, ti.u32)
rowF = ti.types.vector(N_FEATURES, ti.f32)
row16 = ti.types.vector(OUTPUT, ti.f32)
row64 = ti.types.vector(WIDTH, ti.f32)
f32buf = ti.types.ndarray(ti.f32, ndim=1)
i32buf = ti.types.ndarray(ti.i32, ndim=1)
u32buf = ti.types.ndarray(ti.u32, ndim=1)
rowsF = ti.types.ndarray(rowF, ndim=1)
rows16 = ti.types.ndarray(row16, ndim=1)
rows64 = ti.types.ndarray(row64, ndim=1)

# Streams of random numbers; background and cell take three each, one per component.
STREAM_VIEW, STREAM_PIXEL, STREAM_JITTER, STREAM_BACKGROUND, STREAM_CELL, STREAM_INIT = 0, 1, 2, 3, 6, 9


# ---- Random numbers -------------------------------------------------------------------------------------------------

@ti.func
def hash_u32(x):
    """PCG as a hash of one u32, a step and the output permutation (Jarzynski and Olano 2020, "Hash Functions for GPU
    Rendering")."""
    state = x * ti.u32(747796405) + ti.u32(2891336453)
    word = ((state >> ((state >> 28) + ti.u32(4))) ^ state) * ti.u32(277803737)
    return (word >> 22) ^ word


@ti.func
def random_u32(seed, stream, step, index):
    """Counter-based: the same four numbers give the same 32 bits on every backend, in any order of threads."""
    return hash_u32(ti.u32(index) + hash_u32(ti.u32(step) + hash_u32(ti.u32(stream) + hash_u32(ti.u32(seed)))))


@ti.func
def random_f32(seed, stream, step, index):
    """Uniform in [0, 1): the upper 24 bits, which f32 holds exactly."""
    return ti.cast(random_u32(seed, stream, step, index) >> 8, ti.f32) * (1.0 / 16777216.0)


@ti.func
def shuffled(t, n, seed, stream, epoch, index):
    """The t-th (u32, t < n) of the numbers 0 .. n - 1, n >= 1, in a random order: a permutation, another one for each
    seed, stream, epoch and index.

    On numbers of `bits` bits, as many as n - 1 has and at least 1, each of four rounds is one to one: times an odd
    number, plus a random one, modulo 2^bits, then the upper bits // 2 bits XORed onto the lowest. What is not below n
    goes through all four again, until it is (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", cycle
    walking).
    """
    bits = ti.u32(1)
    while ti.u32(n - 1) >> bits > ti.u32(0):
        bits += ti.u32(1)
    x, low = t, (ti.u32(1) << bits) - ti.u32(1)
    again = True
    while again:
        for part in ti.static(range(4)):
            x = (x * ti.u32(747796405) + random_u32(seed, stream, epoch, 4 * index + part)) & low
            x ^= x >> (bits + ti.u32(1) >> ti.u32(1))
        again = x >= ti.u32(n)
    return ti.cast(x, ti.i32)


@ti.kernel
def fill_uniform(n: ti.i32, first: ti.i32, bound: ti.f32, seed: ti.i32, params: rowsF):
    """Initial parameters: U(-bound, bound) for the n numbers from `first` on.

    params   [>= (first + n) / F] rows of F  out
    thread   one per number
    """
    for t in range(first, first + n):
        params[t // N_FEATURES][t % N_FEATURES] = bound * (2.0 * random_f32(seed, STREAM_INIT, 0, t) - 1.0)


# ---- Rays -----------------------------------------------------------------------------------------------------------

@ti.kernel
def pick_pixels(n_rays: ti.i32, n_views: ti.i32, turn: ti.i32, first: ti.i32, seed: ti.i32, size: i32buf,
                margin: i32buf, ray_pixel: i32buf, ray_view: i32buf, ray_code: i32buf):
    """Pixels of a training batch, a piece of an endless list: a turn has one pixel of each view, the views in a random
    order. A view's epoch is as many turns as it has pixels within its margins: each comes once, in a random order,
    which teaches more than independent draws.

    The batch begins with view `first` of a turn: turn, first = the rays of all steps before // n_views and % n_views.
    Each view has a code, see color_input_forward, and there is one more, the neutral code, which a share of all rays
    has instead: it comes to stand for what the photographs have in common, and new views are rendered with it.
    size       [n_views, 4]  in    first pixel, width, height, lens: see generate_rays
    margin     [n_views, 4]  in    pixels on the left, above, on the right and below that are left out: see crop_views
    ray_pixel  [n_rays]      out   index of the pixel: size[view][0] + row * width + column
    ray_view   [n_rays]      out   the view
    ray_code   [n_rays]      out   the view, or n_views: neutral
    thread     one per ray
    """
    for r in range(n_rays):
        now = ti.u32(turn) + ti.u32((first + r) // n_views)
        v = shuffled(ti.u32((first + r) % n_views), n_views, seed, STREAM_VIEW, now, 0)
        width = size[4 * v + 1] - margin[4 * v] - margin[4 * v + 2]
        n = width * (size[4 * v + 2] - margin[4 * v + 1] - margin[4 * v + 3])
        at = shuffled(now % ti.u32(n), n, seed, STREAM_PIXEL, now // ti.u32(n), v)
        row, column = margin[4 * v + 1] + at // width, margin[4 * v] + at % width
        ray_pixel[r] = size[4 * v] + row * size[4 * v + 1] + column
        ray_view[r] = v
        ray_code[r] = ti.select(r % NEUTRAL_EVERY == 0, n_views, v)


@ti.kernel
def list_pixels(n_rays: ti.i32, first: ti.i32, ray_pixel: i32buf, ray_view: i32buf, ray_code: i32buf):
    """Pixels of an image that is rendered, the only view there is: the n_rays pixels from `first` on.

    ray_pixel, ray_view, ray_code  [n_rays]  out   as in pick_pixels; view and code are the first there are
    thread     one per ray
    """
    for r in range(n_rays):
        ray_pixel[r] = first + r
        ray_view[r] = 0
        ray_code[r] = 0


@ti.func
def distort(x, y, m, camera: ti.template()):
    """Where OpenCV's lens model, with nerfstudio's k4, puts the point that a pinhole camera would see at (x, y), and
    the Jacobian; in units of the focal length, y down, r^2 = x^2 + y^2:

        x_d = x (1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8) + 2 p1 x y + p2 (r^2 + 2 x^2)
        y_d = y (...)                                   + 2 p2 x y + p1 (r^2 + 2 y^2)
    """
    k1, k2, k3, k4 = camera[m + 16], camera[m + 17], camera[m + 18], camera[m + 19]
    p1, p2 = camera[m + 20], camera[m + 21]
    r2 = x * x + y * y
    radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    slope = 2.0 * (k1 + r2 * (2.0 * k2 + r2 * (3.0 * k3 + r2 * 4.0 * k4)))         # of radial: d/dx = slope x
    across = slope * x * y + 2.0 * p1 * x + 2.0 * p2 * y
    return (x * radial + 2.0 * p1 * x * y + p2 * (r2 + 2.0 * x * x),
            y * radial + 2.0 * p2 * x * y + p1 * (r2 + 2.0 * y * y),
            radial + slope * x * x + 2.0 * p1 * y + 6.0 * p2 * x, across,
            radial + slope * y * y + 2.0 * p2 * x + 6.0 * p1 * y)


@ti.func
def lens_direction(column, row, v, size: ti.template(), camera: ti.template()):
    """Direction, as camera v sees it (x right, y up, looking down -z; any length), of the light that falls on a point
    of its image (in pixels); (0, 0, 0) if there is none: where a lens model is not one to one. size and camera are
    those of generate_rays.

    Newton's method inverts the lens model, starting from the distorted point; without distortion that is the solution.
    Lens 0: distort(). Lens 1, OpenCV's fisheye: theta is the angle to the optical axis, and the distance from the
    principal point in focal lengths is theta_d = theta (1 + k1 theta^2 + k2 theta^4 + k3 theta^6 + k4 theta^8).
    """
    m = CAMERA * v
    x_d, y_d = (column - camera[m + 14]) / camera[m + 12], (row - camera[m + 15]) / camera[m + 13]
    direction = vec3(x_d, -y_d, -1.0)
    solved = False
    turn = 0
    if size[4 * v + 3] == 1:
        theta_d = ti.sqrt(x_d * x_d + y_d * y_d)
        theta = theta_d
        while not solved and turn < 20:
            a = theta * theta
            k1, k2, k3, k4 = camera[m + 16], camera[m + 17], camera[m + 18], camera[m + 19]
            error = theta * (1.0 + a * (k1 + a * (k2 + a * (k3 + a * k4)))) - theta_d
            slope = 1.0 + a * (3.0 * k1 + a * (5.0 * k2 + a * (7.0 * k3 + a * 9.0 * k4)))
            solved = ti.abs(error) <= LENS_TOLERANCE and slope > 0.0 and theta < 3.14159
            theta -= error / slope
            turn += 1
        if theta_d > 0.0:
            direction = vec3(x_d, -y_d, 0.0) * (ti.sin(theta) / theta_d)
        direction[2] = -ti.cos(theta)
    else:
        x, y = x_d, y_d
        while not solved and turn < 20:
            x_got, y_got, xx, xy, yy = distort(x, y, m, camera)
            dx, dy = x_got - x_d, y_got - y_d
            det = xx * yy - xy * xy
            solved = ti.max(ti.abs(dx), ti.abs(dy)) <= LENS_TOLERANCE and det > 0.0 and xx > 0.0
            x -= (yy * dx - xy * dy) / det
            y -= (xx * dy - xy * dx) / det
            turn += 1
        direction = vec3(x, -y, -1.0)
    if not solved:
        direction = vec3(0.0)
    return direction


@ti.func
def cross_box(origin, direction, low, high, t_first, t_last):
    """Where the part of a ray that lies in a box and between t_first and t_last begins and ends. If there is no such
    part, the end is before the beginning."""
    for c in ti.static(range(3)):
        # A component of 0 never crosses its two planes: put the crossings far away instead of dividing by 0.
        d = ti.select(ti.abs(direction[c]) < 1e-9, 1e-9, direction[c])
        t_0, t_1 = (low[c] - origin[c]) / d, (high[c] - origin[c]) / d
        t_first = ti.max(t_first, ti.min(t_0, t_1))
        t_last = ti.min(t_last, ti.max(t_0, t_1))
    return t_first, t_last


@ti.kernel
def generate_rays(n_rays: ti.i32, unbounded: ti.i32, near: ti.f32, step_length: ti.f32, jitter: ti.i32, seed: ti.i32,
                  step: ti.i32, ray_pixel: i32buf, ray_view: i32buf, size: i32buf, camera: f32buf, ray: f32buf,
                  ray_step: i32buf, pixel: f32buf, depth: f32buf):
    """Ray through the centre of each pixel, and where it enters and leaves the unit cube.

        direction = normalize(R lens_direction(column + 0.5, row + 0.5))
        t_first   = max(near, entry) + u step_length       u random in [0, 1) while training (jitter = 1), 1/2 otherwise

    An unbounded scene has no walls: there rays go from `near` to FAR.
    ray_pixel  [n_rays]      in    size[view][0] + row * width + column
    ray_view   [n_rays]      in    the view
    size       [n_views, 4]  in    first pixel, width, height, lens
    camera     [n_views, 22] in    camera to cube, 3 rows of 4 (R | origin), R a rotation, the camera looks down -z;
                                   fx, fy, cx, cy in pixels; k1, k2, k3, k4, p1, p2: see distort
    ray        [n_rays, 8]   out   origin, t_first, direction (unit length), t_last; t_last < t_first if it misses
    ray_step   [n_rays]      out   0: the next step to march
    pixel      [n_rays, 4]   out   (0, 0, 0, 1): no light gathered yet, all of it still to come
    depth      [n_rays]      out   0
    thread     one per ray
    """
    for r in range(n_rays):
        v = ray_view[r]
        at = ray_pixel[r] - size[4 * v]
        m = CAMERA * v
        local = lens_direction(at % size[4 * v + 1] + 0.5, at // size[4 * v + 1] + 0.5, v, size, camera)
        origin, direction = vec3(0.0), vec3(0.0)
        for c in ti.static(range(3)):
            origin[c] = camera[m + 4 * c + 3]
            direction[c] = (camera[m + 4 * c] * local[0] + camera[m + 4 * c + 1] * local[1]
                            + camera[m + 4 * c + 2] * local[2])
        length = direction.norm()
        direction = direction / ti.max(length, 1e-9)

        t_first = near
        t_last = ti.select(length > 0.0, ti.select(unbounded == 1, FAR, 1e9), -1.0)
        if unbounded == 0:
            t_first, t_last = cross_box(origin, direction, vec3(0.0), vec3(1.0), t_first, t_last)
        u = ti.select(jitter == 1, random_f32(seed, STREAM_JITTER, step, r), 0.5)

        for c in ti.static(range(3)):
            ray[8 * r + c] = origin[c]
            ray[8 * r + 4 + c] = direction[c]
            pixel[4 * r + c] = 0.0
        ray[8 * r + 3] = t_first + u * step_length
        ray[8 * r + 7] = t_last
        pixel[4 * r + 3] = 1.0
        depth[r] = 0.0
        ray_step[r] = 0


# ---- Contraction of unbounded space (Barron et al. 2022, "Mip-NeRF 360", equation 10)

@ti.func
def contract(x):
    """A point of space to one of the cube. With y = (x - middle) / RADIUS, the ball |y| <= 1 stays as it is, and all
    that is beyond goes into the shell around it, up to |y| = 2, the ball that just fits into the cube:

        contract(y) = (2 - 1 / |y|) y / |y|        where |y| > 1
    """
    y = (x - 0.5) / RADIUS
    n = ti.max(y.norm(), 1.0)
    return 0.5 + RADIUS * y * ((2.0 - 1.0 / n) / n)


@ti.func
def expand(x):
    """The inverse of contract; points that nothing is contracted to go to the far end."""
    y = (x - 0.5) / RADIUS
    n = ti.max(y.norm(), 1.0)
    return 0.5 + RADIUS * y * (1.0 / (n * ti.max(2.0 - n, RADIUS / FAR)))


@ti.kernel
def contract_samples(counter: i32buf, sample: f32buf):
    """Samples from space into the cube; only in unbounded scenes. t and dt stay lengths before bending. It has no
    backward: warps, whose parameters have gradients, come after it.

    counter  [4]             in
    sample   [n_samples, 5]  in-out  the position
    thread   one per sample
    """
    for i in range(counter[0]):
        x = contract(vec3(sample[5 * i], sample[5 * i + 1], sample[5 * i + 2]))
        for c in ti.static(range(3)):
            sample[5 * i + c] = x[c]


# ---- Occupancy grid: which of grid_size^3 cells may hold something (instant-ngp, section E.2). Cells are numbered by
# bricks of 4x4x2: a brick is one u32 word of the packed bits. A ray leaves an empty brick in one go, and an empty block
# of 4x4x4 bricks too. The packed buffer `occupancy` holds, with n = grid_size^3 / 32 words,
#     words [0, n)              bit c of word w: is cell 32 w + c occupied?
#     words [n, n + n / 64)     one word per block: not 0 if any of its cells is occupied
#     the n words after these   bit c of word w: is cell 32 w + c dark? It is occupied, but the light of no training ray
#                               has reached it for long: rays end there, since most of what is occupied is hidden
#     the last 6                how many layers of bricks, 4, 4 and 2 cells thick, are empty: counted from the walls
#                               where x, y and z are 0, then from those where they are 1; n where nothing is occupied
# density_grid is -1 in cells that are given up before training, for good: no view sees them, or three see that they are
# empty. All others are live. grid_size is a power of two and at least 16.

@ti.func
def cell_of(x, resolution):
    """The cell around a coordinate that is measured in cells, 0 to resolution; the far wall belongs to the last."""
    return ti.math.clamp(ti.cast(ti.floor(x), ti.i32), 0, resolution - 1)


@ti.func
def cell_number(x, y, z, grid_size):
    """Number of a cell from its i32 coordinates."""
    n = grid_size >> 2
    return (((z >> 1) * n + (y >> 2)) * n + (x >> 2)) << 5 | (z & 1) << 4 | (y & 3) << 2 | (x & 3)


@ti.func
def cell_corner(number, grid_size):
    """Coordinates of a cell's lower corner, in cells: the inverse of cell_number."""
    brick, n = number >> 5, grid_size >> 2
    return vec3(brick % n * 4 + (number & 3), brick // n % n * 4 + (number >> 2 & 3),
                brick // (n * n) * 2 + (number >> 4 & 1))


@ti.func
def scattered_brick(t, grid_size):
    """The t-th brick in a scattered order: an odd factor permutes the numbers below a power of two."""
    n_bricks = ti.u32(grid_size * grid_size * grid_size // 32)
    return ti.cast(ti.u32(t) * ti.u32(2654435761) & (n_bricks - ti.u32(1)), ti.i32)


@ti.kernel
def bound_views(n_views: ti.i32, size: i32buf, camera: f32buf, view_bound: f32buf):
    """The pyramid of view around what each camera sees: the largest slopes of light along the border of its image.

    size        [n_views, 4]   in
    camera      [n_views, 22]  in    see generate_rays
    view_bound  [n_views, 4]   out   lowest and highest x / depth, lowest and highest y / depth, y up; -1e4 and 1e4
                                     where the border sees further than that, or nothing
    thread      one per view
    """
    for v in range(n_views):
        width, height = size[4 * v + 1], size[4 * v + 2]
        low, high = ti.Vector([1e4, 1e4]), ti.Vector([-1e4, -1e4])
        for t in range(2 * (width + height)):        # clockwise from the upper left corner
            column = ti.math.clamp(t, 0, width) - ti.math.clamp(t - width - height, 0, width)
            row = ti.math.clamp(t - width, 0, height) - ti.math.clamp(t - 2 * width - height, 0, height)
            direction = lens_direction(ti.cast(column, ti.f32), ti.cast(row, ti.f32), v, size, camera)
            for c in ti.static(range(2)):
                slope = direction[c] / ti.max(-direction[2], 1e-4)
                low[c] = ti.select(direction[2] > -1e-4, -1e4, ti.min(low[c], slope))
                high[c] = ti.select(direction[2] > -1e-4, 1e4, ti.max(high[c], slope))
        for c in ti.static(range(2)):
            view_bound[4 * v + 2 * c] = low[c]
            view_bound[4 * v + 2 * c + 1] = high[c]


@ti.func
def seen_from(view, camera: ti.template(), x):
    """R^T (x - origin), a point of the cube in a camera's own frame: x right, y up, z backwards. The inverse of a
    rotation is its transpose."""
    m = CAMERA * view
    p = vec3(0.0)
    for c in ti.static(range(3)):
        for a in ti.static(range(3)):
            p[c] += camera[m + 4 * a + c] * (x[a] - camera[m + 4 * a + 3])
    return p


@ti.kernel
def mark_visible_cells(grid_size: ti.i32, unbounded: ti.i32, n_views: ti.i32, near: ti.f32, camera: f32buf,
                       view_bound: f32buf, density_grid: f32buf):
    """Cells that no camera sees are marked -1 for good: nothing would ever correct a guess made there.

    A cell counts as seen unless the sphere around it lies outside one of the pyramid of view's four sides, behind the
    camera, or nearer than `near`. A view whose bounds are 1e4 may see all around itself.
    camera        [n_views, 22]   in    see generate_rays
    view_bound    [n_views, 4]    in    from bound_views
    density_grid  [grid_size^3]   out   UNKNOWN where a camera sees the cell, -1 elsewhere
    thread        one per cell
    """
    for t in range(grid_size * grid_size * grid_size):
        center = (cell_corner(t, grid_size) + 0.5) / grid_size
        radius = 0.8660254 / grid_size
        seen, view = False, 0
        if unbounded == 1:                           # the sphere around the cell as it was before bending
            if (center - 0.5).norm() > 2.0 * RADIUS + radius:
                view = n_views                       # nothing is contracted to any of this cell
            middle = center
            center = expand(middle)
            for corner in range(8):
                x = vec3(corner & 1, corner >> 1 & 1, corner >> 2) - 0.5
                radius = ti.max(radius, (expand(middle + x / grid_size) - center).norm())
        while not seen and view < n_views:
            p = seen_from(view, camera, center)
            depth = -p[2]
            around = view_bound[4 * view + 1] >= 1e4
            seen = (around or depth > -radius) and p.norm() > near - radius
            for c in ti.static(range(2)):
                low, high = view_bound[4 * view + 2 * c], view_bound[4 * view + 2 * c + 1]
                if not around and p[c] - high * depth > radius * ti.sqrt(1.0 + high * high):
                    seen = False
                if not around and low * depth - p[c] > radius * ti.sqrt(1.0 + low * low):
                    seen = False
            view += 1
        density_grid[t] = UNKNOWN if seen else -1.0


@ti.func
def footprint(p, radius, view, camera: ti.template()):
    """First and last column and row of pixels, as a pair of vectors, in which a pinhole camera sees some of a sphere.

    The sphere of radius rho around p, as the camera sees it, with d = -p_z > rho, lies between

        x / depth = (d p_x -+ rho sqrt(d^2 + p_x^2 - rho^2)) / (d^2 - rho^2)        -p_y in place of p_x for rows

    and thus between two columns, floor(cx + fx x / depth), and two rows.
    """
    low, high = ti.Vector([0, 0]), ti.Vector([0, 0])
    depth = -p[2]
    square = depth * depth - radius * radius
    for c in ti.static(range(2)):
        x = ti.static((1, -1)[c]) * p[c]                                     # rows count downwards
        room = radius * ti.sqrt(square + x * x)
        f, middle = camera[CAMERA * view + 12 + c], camera[CAMERA * view + 14 + c]
        low[c] = ti.cast(ti.floor(ti.math.clamp(middle + f * (depth * x - room) / square, -1.0, 1e6)), ti.i32)
        high[c] = ti.cast(ti.floor(ti.math.clamp(middle + f * (depth * x + room) / square, -1.0, 1e6)), ti.i32)
    return low, high


@ti.kernel
def carve_cells(grid_size: ti.i32, n_views: ti.i32, size: i32buf, camera: f32buf, image: u32buf, density_grid: f32buf):
    """Cells in which CARVED_BY views see nothing at all, alpha 0, are marked -1, too. What is left is little more than
    the visual hull (Laurentini 1994); one view would do if silhouettes were never wrong. For pinhole cameras, and a
    scene in a box that does not move.

    All pixels in the footprint of the sphere around the cell, at most FOOTPRINT of them, have to be in the image and 0;
    other views do not count.
    size          [n_views, 4]           in      see generate_rays
    camera        [n_views, 22]          in
    image         [pixels of all views]  in      see loss_and_gradient: alpha in the highest byte
    density_grid  [grid_size^3]          in-out  from mark_visible_cells
    thread        one per cell
    """
    for t in range(grid_size * grid_size * grid_size):
        center = (cell_corner(t, grid_size) + 0.5) / grid_size
        radius = 0.8660254 / grid_size
        empty = 0
        view = ti.select(density_grid[t] >= 0.0, 0, n_views)
        while empty < CARVED_BY and view < n_views:
            p = seen_from(view, camera, center)
            if -p[2] > radius:
                low, high = footprint(p, radius, view, camera)
                inside = low.min() >= 0 and high[0] < size[4 * view + 1] and high[1] < size[4 * view + 2]
                if inside and (high[0] - low[0] + 1) * (high[1] - low[1] + 1) <= FOOTPRINT:
                    alpha = ti.u32(0)
                    row = low[1]
                    while alpha == ti.u32(0) and row <= high[1]:
                        for column in range(low[0], high[0] + 1):
                            alpha |= image[size[4 * view] + row * size[4 * view + 1] + column] >> 24
                        row += 1
                    if alpha == ti.u32(0):
                        empty += 1
            view += 1
        if empty == CARVED_BY:
            density_grid[t] = -1.0


@ti.kernel
def count_live_cells(grid_size: ti.i32, density_grid: f32buf, brick_span: i32buf):
    """How many cells of each brick are live (density_grid >= 0). The scan of marching makes spans of these numbers,
    with bricks for rays and cells for samples.

    density_grid  [grid_size^3]           in
    brick_span    [grid_size^3 / 32, 2]   out   [1] = number of live cells; row t is of brick scattered_brick(t)
    thread        one per row
    """
    for t in range(grid_size * grid_size * grid_size // 32):
        count = 0
        for c in range(32):
            if density_grid[32 * scattered_brick(t, grid_size) + c] >= 0.0:
                count += 1
        brick_span[2 * t + 1] = count


@ti.kernel
def list_live_cells(grid_size: ti.i32, density_grid: f32buf, brick_span: i32buf, live_cell: i32buf):
    """The live cells, in the order in which updates of the grid look at them, round after round: bricks scattered, so
    that every part of the scene is looked at soon, and cells of a brick in a row, in the order of their numbers, since
    neighbours share hash-table slots.

    density_grid  [grid_size^3]           in
    brick_span    [grid_size^3 / 32, 2]   in    rows as in count_live_cells; [0] = where in live_cell the brick begins,
                                                from claim_spans
    live_cell     [grid_size^3]           out   numbers of cells, as many as are live
    thread        one per row of brick_span
    """
    for t in range(grid_size * grid_size * grid_size // 32):
        at = brick_span[2 * t]
        for c in range(32):
            cell = 32 * scattered_brick(t, grid_size) + c
            if density_grid[cell] >= 0.0:
                live_cell[at] = cell
                at += 1


@ti.kernel
def crop_views(grid_size: ti.i32, n_views: ti.i32, size: i32buf, camera: f32buf, counter: i32buf, live_cell: i32buf,
               margin: i32buf):
    """The rectangle of each view that holds all live cells in sight, after carve_cells: rays beside it meet nothing,
    and have nothing to teach. It is around a pixel in the middle and the footprints of the cells' spheres; all of the
    view where one touches the camera's plane.

    size       [n_views, 4]     in      see generate_rays
    camera     [n_views, 22]    in
    counter    [4]              in      [0] = live cells
    live_cell  [grid_size^3]    in      from list_live_cells
    margin     [n_views, 4]     in-out  columns on the left, rows above, columns on the right and rows below in which no
                                        live cell lies; in: all but one pixel in the middle, so that one is left
    thread     one per live cell and view; in a loop over views, some drivers lose atomics (Mesa's in software)
    atomic     i32 min on margin; the look at it before only spares most of them, and may be out of date
    """
    for t in range(counter[0] * n_views):
        v = t % n_views
        p = seen_from(v, camera, (cell_corner(live_cell[t // n_views], grid_size) + 0.5) / grid_size)
        radius = 0.8660254 / grid_size
        end = ti.Vector([size[4 * v + 1], size[4 * v + 2]])
        low, high = ti.Vector([0, 0]), end - 1
        if -p[2] > radius:
            low, high = footprint(p, radius, v, camera)
        if p[2] < radius and high.min() >= 0 and low[0] < end[0] and low[1] < end[1]:
            for c in ti.static(range(2)):
                before, behind = ti.max(low[c], 0), ti.max(end[c] - 1 - high[c], 0)
                if before < margin[4 * v + c]:
                    ti.atomic_min(margin[4 * v + c], before)
                if behind < margin[4 * v + 2 + c]:
                    ti.atomic_min(margin[4 * v + 2 + c], behind)


@ti.kernel
def place_cell_samples(n: ti.i32, first: ti.i32, grid_size: ti.i32, step_length: ti.f32, growth: ti.f32, seed: ti.i32,
                       step: ti.i32, live_counter: i32buf, live_cell: i32buf, sample: f32buf, counter: i32buf):
    """A random point in each of n live cells, or of all if there are fewer, as samples for hash_encode_forward and
    probe_density. Sample t is of cell live_cell[(first + t) % live_counter[0]], first >= 0; where none is live there
    are no samples, and nothing is divided by 0:

        position_c = (corner_c + random_f32(seed, STREAM_CELL + c, step, t)) / grid_size
        dt         = step_length + growth |expand(position) - 1/2|, the step of a ray from the middle

    live_counter  [4]             in    [0] = number of live cells
    live_cell     [grid_size^3]   in    from list_live_cells
    sample        [n_samples, 5]  out   position, 0, dt
    counter       [4]             out   [0] = n_samples = min(n, live_counter[0]); a buffer of its own
    thread        n, n >= 1: the t-th makes sample t, if there is one, and the first writes n_samples, also if it is 0
    """
    for t in range(n):
        n_live = live_counter[0]
        if t < n_live:
            x = cell_corner(live_cell[(first + t) % n_live], grid_size)
            for c in ti.static(range(3)):
                x[c] = (x[c] + random_f32(seed, STREAM_CELL + c, step, t)) / grid_size
                sample[5 * t + c] = x[c]
            sample[5 * t + 3] = 0.0
            sample[5 * t + 4] = step_length + growth * (expand(x) - 0.5).norm()
        if t == 0:
            counter[0] = ti.min(n, n_live)


@ti.kernel
def update_density_grid(first: ti.i32, decay: ti.f32, counter: i32buf, live_counter: i32buf, live_cell: i32buf,
                        sample: f32buf, cell_sigma: f32buf, density_grid: f32buf):
    """What the grid holds is sigma dt, the share of light that one training step through the cell takes (while it is
    small): the largest seen there, which counts `decay` as much after each update of the grid. A cell's turn comes
    every n_live / n_samples updates: grid = max(decay^(n_live / n_samples) grid, sigma dt), or sigma dt where grid is
    UNKNOWN.

    counter       [4]             in      [0] = n_samples, from place_cell_samples, of the same `first`; at most
                                          n_live = live_counter[0]: no cell comes twice, and each has one writer
    live_counter, live_cell       in      as in place_cell_samples
    sample        [n_samples, 5]  in      from there: [4] = dt
    cell_sigma    [n_samples]     in      at these points
    density_grid  [grid_size^3]   in-out
    thread        one per sample
    """
    for t in range(counter[0]):
        cell = live_cell[(first + t) % live_counter[0]]
        share = decay ** (ti.cast(live_counter[0], ti.f32) / counter[0])
        before = ti.select(density_grid[cell] >= UNKNOWN, 0.0, share * density_grid[cell])
        density_grid[cell] = ti.max(before, cell_sigma[t] * sample[5 * t + 4])


@ti.kernel
def sum_density_grid(n_cells: ti.i32, block: ti.i32, density_grid: f32buf, block_density: f32buf):
    """Sums towards the mean density of the cells whose density is known, in a fixed order.

    density_grid   [n_cells]                   in
    block_density  [ceil(n_cells / block), 2]  out   sum of densities, number of cells
    thread         one per block of cells
    """
    for t in range((n_cells + block - 1) // block):
        total = 0.0
        number = 0.0
        for cell in range(block * t, ti.min(n_cells, block * (t + 1))):
            known = 0.0 <= density_grid[cell] < UNKNOWN              # no branch: a CPU takes several cells at once
            total += ti.select(known, density_grid[cell], 0.0)
            number += ti.select(known, 1.0, 0.0)
        block_density[2 * t] = total
        block_density[2 * t + 1] = number


@ti.kernel
def find_threshold(n_blocks: ti.i32, limit: ti.f32, block_density: f32buf, threshold: f32buf):
    """Density above which a cell counts as occupied: min(limit, 0.95 mean); 0 while no density is known.

    While the field is still a uniform fog every cell equals the mean, and a threshold at the mean itself would
    empty the whole box; hence the 0.95.
    block_density  [n_blocks, 2]  in    from sum_density_grid
    threshold      [1]            out
    thread         a single one
    """
    for _ in range(1):
        total = 0.0
        number = 0.0
        for b in range(n_blocks):
            total += block_density[2 * b]
            number += block_density[2 * b + 1]
        threshold[0] = ti.min(limit, 0.95 * total / ti.max(number, 1.0))


@ti.kernel
def pack_occupancy(n_words: ti.i32, step: ti.i32, patience: ti.i32, density_grid: f32buf, threshold: f32buf,
                   lit_step: i32buf, occupancy: u32buf):
    """Two bits per cell: is it occupied, its density above the threshold, and is it dark, occupied for more than
    `patience` steps without light?

    density_grid  [32 n_words]                in    numbered brick by brick
    threshold     [1]                         in
    lit_step      [32 n_words]                in-out  from mark_lit_cells; out: `step` where the cell is not occupied
    occupancy     [2 n_words + n_words / 64 + 6]  out   all but the blocks' words; the last 6: n_words, more than
                                                  there are layers, for pack_blocks to lower
    thread        one per brick
    """
    for t in range(n_words):
        word, dark = ti.u32(0), ti.u32(0)
        for c in range(32):
            if density_grid[32 * t + c] > threshold[0]:
                word |= ti.u32(1) << ti.u32(c)
                if step - lit_step[32 * t + c] > patience:
                    dark |= ti.u32(1) << ti.u32(c)
            else:
                lit_step[32 * t + c] = step
        occupancy[t] = word
        occupancy[n_words + n_words // 64 + t] = dark
        if t < 6:
            occupancy[2 * n_words + n_words // 64 + t] = ti.u32(n_words)


@ti.kernel
def pack_blocks(grid_size: ti.i32, occupancy: u32buf):
    """One word per block of 4x4x4 bricks, 16x16x8 cells: is any cell in it occupied? And how many layers of bricks are
    empty on each side of the grid.

    occupancy  [2 n + n / 64 + 6]  in-out  in: the bricks' words, and the last 6 from pack_occupancy; out: the
                                       blocks' words and the last 6
    thread     one per block
    atomic     u32 min on occupancy, in its last 6; the look at it before only spares most of them, and may be out of
               date
    """
    n = grid_size >> 4
    for t in range(n * n * n * 2):
        any_cell = ti.u32(0)
        first, last = ti.Vector([n << 3, n << 3, n << 3]), ti.Vector([0, 0, 0])      # bricks that are not empty
        for brick in range(64):
            at = ti.Vector([t % n << 2 | brick & 3, t // n % n << 2 | brick >> 2 & 3, t // (n * n) << 2 | brick >> 4])
            word = occupancy[((at[2] << 2) * n + at[1]) * (n << 2) + at[0]]
            any_cell |= word
            if word != ti.u32(0):
                first, last = ti.min(first, at), ti.max(last, at)
        occupancy[n * n * n * 128 + t] = any_cell
        if any_cell != ti.u32(0):
            side = n * n * n * 258
            for c in ti.static(range(3)):
                below, above = ti.u32(first[c]), ti.u32((n << ti.static((2, 2, 3)[c])) - 1 - last[c])
                if below < occupancy[side + c]:
                    ti.atomic_min(occupancy[side + c], below)
                if above < occupancy[side + 3 + c]:
                    ti.atomic_min(occupancy[side + 3 + c], above)


# ---- Marching: count each ray's samples, scan the counts into spans, write the samples. Two walks instead of an atomic
# counter keep the samples in ray order, whatever the order of threads. Training marches each ray to its end; rendering
# goes in waves: march at most `limit` samples per ray, forward, composite, until no ray has any left. A ray that was
# dropped for want of room does not go on: in rendering the next wave takes it.

@ti.func
def step_distance(k, step_length, growth):
    """How far step k is behind the first: dt grows with it, dt = step_length + growth distance, so that

        distance = step_length (e^(growth k) - 1) / growth,  or k step_length where steps do not grow
    """
    distance = k * step_length
    if growth > 0.0:
        distance = step_length * (ti.exp(growth * k) - 1.0) / growth
    return distance


@ti.func
def steps_within(distance, dt, growth):
    """How many steps, the first of length dt, cover a distance: the inverse of step_distance."""
    steps = distance / dt
    if growth > 0.0:
        steps = ti.log(1.0 + growth * steps) / growth
    return steps


@ti.func
def distance_bent(y, room):
    """How far one can go from y, any way, before the contracted point moves by `room`; all in units of RADIUS.

    At |y| = n > 1 the contraction shrinks lengths to at most shrink(n) = (2 n - 1) / n^2, across the ray from the
    middle; along it to 1 / n^2. A path shorter than n / 2 stays outside of the radius n / 2, where nothing is longer
    than shrink(n / 2) of what it was; nothing is stretched anywhere.
    """
    half = ti.max(0.5 * y.norm(), 1.0)
    return ti.max(room, ti.min(half, room * half * half / (2.0 * half - 1.0)))


@ti.func
def next_sample(origin, direction, t_first, t_last, k, step_length, growth, unbounded, grid_size,
                occupancy: ti.template()):
    """The first step index >= k whose point, step_distance(k) behind t_first, lies before t_last and in a cell that is
    set in `occupancy`, END if there is none; and whether that cell is dark.

    An empty cell, or a whole empty brick or block, is left in one go, by as many whole steps as it takes: the points
    that are tested do not depend on what lies between them. Where space is bent, so are rays: there, one goes as far
    as stays inside in any direction.
    """
    n = grid_size >> 4
    inverse, ahead = vec3(0.0), vec3(0.0)
    for c in ti.static(range(3)):
        speed = direction[c] * grid_size             # in cells
        inverse[c] = 1.0 / ti.select(ti.abs(speed) > 1e-6, speed, 1e-6)
        ahead[c] = ti.select(speed >= 0.0, 1.0, 0.0)
    found, dark = END, False
    t = t_first + step_distance(k, step_length, growth)
    while found == END and t < t_last:
        x = origin + t * direction
        bent = False
        if unbounded == 1:
            bent = (x - 0.5).norm() > RADIUS
            if bent:
                x = contract(x)
        cell = ti.Vector([0, 0, 0])
        for c in ti.static(range(3)):
            cell[c] = cell_of(x[c] * grid_size, grid_size)
        scale = 4                                    # log2 of the size of what is left: a block, a brick or a cell
        if occupancy[n * n * n * 128 + ((cell[2] >> 3) * n + (cell[1] >> 4)) * n + (cell[0] >> 4)] != ti.u32(0):
            number = cell_number(cell[0], cell[1], cell[2], grid_size)
            word = occupancy[number >> 5]
            scale = ti.select(word == ti.u32(0), 2, 0)
            if (word >> ti.u32(number & 31)) & ti.u32(1) == ti.u32(1):
                found = k
                dark = (occupancy[n * n * n * 130 + (number >> 5)] >> ti.u32(number & 31)) & ti.u32(1) == ti.u32(1)
        if found == END:
            t_exit = 1e30                            # until the next wall, and the room to the nearest one, in cells
            room = 1e30
            for c in ti.static(range(3)):
                size = ti.max(1, 1 << scale >> ti.static((0, 0, 1)[c]))
                low = (cell[c] & -size) - x[c] * grid_size
                # abs: where speed is next to 0, inverse is positive whatever the sign, and the wall is far away.
                t_exit = ti.min(t_exit, ti.abs((low + ahead[c] * size) * inverse[c]))
                room = ti.min(room, ti.min(-low, low + size))
            if unbounded == 1:
                y = (origin + t * direction - 0.5) / RADIUS
                if bent or (origin + (t + t_exit) * direction - 0.5).norm() > RADIUS:
                    t_exit = RADIUS * distance_bent(y, ti.max(room, 0.0) / (grid_size * RADIUS))
            dt = step_length + growth * (t - t_first)
            k += ti.max(1, ti.cast(ti.ceil(steps_within(t_exit, dt, growth)), ti.i32))
            t = t_first + step_distance(k, step_length, growth)
    return found, dark


@ti.func
def occupied_box(grid_size, occupancy: ti.template()):
    """Lower and upper corner of a box around all that is set in `occupancy`: whole bricks, and half a cell more, so
    that no rounding matters. Where nothing is set, it is around everything."""
    n = grid_size >> 4
    low, high = vec3(0.0), vec3(0.0)
    for c in ti.static(range(3)):
        cells = ti.static((4.0, 4.0, 2.0)[c])
        below, above = occupancy[n * n * n * 258 + c], occupancy[n * n * n * 258 + 3 + c]
        low[c] = (ti.cast(below, ti.f32) * cells - 0.5) / grid_size
        high[c] = 1.0 - (ti.cast(above, ti.f32) * cells - 0.5) / grid_size
    return low, high


@ti.kernel
def count_samples(n_rays: ti.i32, limit: ti.i32, step_length: ti.f32, growth: ti.f32, unbounded: ti.i32,
                  grid_size: ti.i32, ray: f32buf, ray_step: i32buf, pixel: f32buf, occupancy: u32buf, ray_span: i32buf):
    """First walk: how many samples each ray wants, at most `limit`; none if it has ended, or no light gets through it
    any more. A ray ends with its first sample in a dark cell: if light does get there, mark_lit_cells will see it. In a
    scene with walls, it looks only within the box of occupied bricks.

    ray        [n_rays, 8]       in      see generate_rays
    ray_step   [n_rays]          in-out  step to start from; out: that of the first sample, where there is one
    pixel      [n_rays, 4]       in      [3] = T, the share of light that is still to come
    occupancy  [2 n + n / 64 + 6] in     see above
    ray_span   [n_rays, 2]       out     [1] = number of samples
    thread     one per ray
    """
    for r in range(n_rays):
        origin = vec3(ray[8 * r], ray[8 * r + 1], ray[8 * r + 2])
        direction = vec3(ray[8 * r + 4], ray[8 * r + 5], ray[8 * r + 6])
        count = 0
        k, t_first, t_last = ray_step[r], ray[8 * r + 3], ray[8 * r + 7]
        more = pixel[4 * r + 3] >= T_STOP and k < END
        if more and unbounded == 0:
            low, high = occupied_box(grid_size, occupancy)
            t_in, t_last = cross_box(origin, direction, low, high, t_first, t_last)
            more = t_in < t_last
            if more:
                k = ti.max(k, ti.cast(steps_within(t_in - t_first, step_length, growth), ti.i32))
        while more and count < limit:
            k, dark = next_sample(origin, direction, t_first, t_last, k, step_length, growth, unbounded, grid_size,
                                  occupancy)
            if k < END:
                if count == 0:
                    ray_step[r] = k                  # so that the second walk need not look for it
                count += 1
            more = k < END and not dark
            k += 1
        ray_span[2 * r + 1] = count


@ti.kernel
def sum_counts(n_rays: ti.i32, block: ti.i32, ray_span: i32buf, block_start: i32buf):
    """First part of the scan: samples wanted by each block of rays.

    ray_span     [n_rays, 2]             in    [1] = number of samples
    block_start  [ceil(n_rays / block)]  out   sum over the block
    thread       one per block of rays
    """
    for t in range((n_rays + block - 1) // block):
        total = 0
        for r in range(block * t, ti.min(n_rays, block * (t + 1))):
            total += ray_span[2 * r + 1]
        block_start[t] = total


@ti.kernel
def scan_blocks(n_rays: ti.i32, block: ti.i32, capacity: ti.i32, block_start: i32buf, counter: i32buf):
    """Second part: sums become starts (exclusive scan), up to the first block that does not fit into the buffers.

    block_start  [ceil(n_rays / block)]  in-out  first sample of the block; -1 from the first that does not fit.
                                                 It is on the host to see to it that the first does
    counter      [4]                     in-out  [0] samples, [1] rays of the blocks that fit; [2], [3] running totals
                                                 of dropped rays and of samples, which wrap around (the host takes
                                                 differences)
    thread       a single one
    """
    for _ in range(1):
        samples = 0
        rays = 0
        fits = 1
        for b in range((n_rays + block - 1) // block):
            total = block_start[b]
            if samples + total > capacity:
                fits = 0
            block_start[b] = -1
            if fits == 1:
                block_start[b] = samples
                samples += total
                rays = ti.min(n_rays, block * (b + 1))
        counter[0] = samples
        counter[1] = rays
        counter[2] = counter[2] + n_rays - rays
        counter[3] = counter[3] + samples


@ti.kernel
def claim_spans(n_rays: ti.i32, block: ti.i32, block_start: i32buf, ray_span: i32buf):
    """Third part: each ray gets the span [first, first + count) of the sample buffers, in ray order.

    block_start  [ceil(n_rays / block)]  in
    ray_span     [n_rays, 2]             in-out  in: [1] = samples wanted; out: first sample, number of samples; -1, 0
                                                 if the ray was dropped
    thread       one per block of rays
    """
    for t in range((n_rays + block - 1) // block):
        first = block_start[t]
        for r in range(block * t, ti.min(n_rays, block * (t + 1))):
            ray_span[2 * r] = first
            if first < 0:
                ray_span[2 * r + 1] = 0
            else:
                first += ray_span[2 * r + 1]


@ti.kernel
def write_samples(n_rays: ti.i32, limit: ti.i32, step_length: ti.f32, growth: ti.f32, unbounded: ti.i32,
                  grid_size: ti.i32, ray: f32buf, ray_step: i32buf, occupancy: u32buf, ray_span: i32buf,
                  sample: f32buf):
    """Second walk: the same steps as in count_samples, from the first sample on, now written down. A port must round
    alike in both.

    ray         [n_rays, 8]       in
    ray_step    [n_rays]          in-out  from count_samples; out: where the next wave goes on (END if the ray got
                                          fewer than `limit`: it left the box or is opaque; DARK if the last one is
                                          in a dark cell; unchanged if dropped)
    occupancy   [2 n + n / 64 + 6] in
    ray_span    [n_rays, 2]       in      from claim_spans
    sample      [capacity, 5]     out     position (not contracted yet), t, dt
    thread      one per ray
    """
    for r in range(n_rays):
        origin = vec3(ray[8 * r], ray[8 * r + 1], ray[8 * r + 2])
        direction = vec3(ray[8 * r + 4], ray[8 * r + 5], ray[8 * r + 6])
        k, dark = ray_step[r], False
        first = ray_span[2 * r]
        for i in range(first, first + ray_span[2 * r + 1]):
            k, dark = next_sample(origin, direction, ray[8 * r + 3], ray[8 * r + 7], k, step_length, growth, unbounded,
                                  grid_size, occupancy)
            distance = step_distance(k, step_length, growth)
            for c in ti.static(range(3)):
                sample[5 * i + c] = origin[c] + (ray[8 * r + 3] + distance) * direction[c]
            sample[5 * i + 3] = ray[8 * r + 3] + distance
            sample[5 * i + 4] = step_length + growth * distance
            k += 1
        if first >= 0 and (dark or ray_span[2 * r + 1] < limit):
            k = ti.select(dark, DARK, END)
        ray_step[r] = k


# ---- Multiresolution hash grid (Müller et al. 2022, "Instant Neural Graphics Primitives", section 3)

@ti.func
def grid_slot(x, y, z, resolution, n_slots, hashed):
    """Slot of a grid vertex (u32 coordinates, or vectors of them) within its level: its number where the level is small
    enough to give each of its (resolution + 1)^3 vertices a slot, a hash of its coordinates otherwise (n_slots is a
    power of two)."""
    side = ti.u32(resolution) + ti.u32(1)
    slot = x + side * (y + side * z)
    if hashed == 1:
        slot = (x ^ (y * ti.u32(2654435761)) ^ (z * ti.u32(805459861))) & ti.u32(n_slots - 1)
    return slot


@ti.func
def locate(i, sample: ti.template(), resolution):
    """Lower corner of the cell around sample i, of `resolution` cells a side, and where in it it lies, in [0, 1]^3."""
    cell = ti.Vector([0, 0, 0])
    fraction = vec3(0.0)
    for c in ti.static(range(3)):
        cell[c] = cell_of(sample[5 * i + c] * resolution, resolution)
        fraction[c] = sample[5 * i + c] * resolution - cell[c]
    return cell, fraction


@ti.func
def corner_slots(l, level: ti.template(), cell):
    """Slots of the corners 0..7 of a cell of level l: bit c of a corner's number says on which side of axis c it lies.
    All eight at once, as in corner_weights: a CPU has instructions for that; elsewhere, a loop is as good."""
    x = ti.u32(cell[0]) + uvec8(0, 1, 0, 1, 0, 1, 0, 1)
    y = ti.u32(cell[1]) + uvec8(0, 0, 1, 1, 0, 0, 1, 1)
    z = ti.u32(cell[2]) + uvec8(0, 0, 0, 0, 1, 1, 1, 1)
    return ti.u32(level[4 * l + 1]) + grid_slot(x, y, z, level[4 * l], level[4 * l + 2], level[4 * l + 3])


@ti.func
def corner_weights(fraction):
    """Trilinear weights of the corners, numbered as in corner_slots: along each axis 1 - fraction below, fraction
    above."""
    x = vec8(1, 0, 1, 0, 1, 0, 1, 0) + vec8(-1, 1, -1, 1, -1, 1, -1, 1) * fraction[0]
    y = vec8(1, 1, 0, 0, 1, 1, 0, 0) + vec8(-1, -1, 1, 1, -1, -1, 1, 1) * fraction[1]
    z = vec8(1, 1, 1, 1, 0, 0, 0, 0) + vec8(-1, -1, -1, -1, 1, 1, 1, 1) * fraction[2]
    return x * y * z


@ti.func
def encode_level(l, i, level: ti.template(), sample: ti.template(), table: ti.template(), feature: ti.template()):
    """Level l of the grid (`level`), interpolated at sample i (`sample`) from `table`, into its entries of `feature`:
    see hash_encode_forward."""
    cell, fraction = locate(i, sample, level[4 * l])
    weight, slots = corner_weights(fraction), corner_slots(l, level, cell)
    total = rowF(0.0)
    for corner in ti.static(range(8)):
        total += weight[corner] * table[ti.cast(slots[corner], ti.i32)]
    for c in ti.static(range(N_FEATURES)):
        feature[i][N_FEATURES * l + c] = total[c]


@ti.kernel
def hash_encode_forward(n_levels: ti.i32, counter: i32buf, level: i32buf, sample: f32buf, table: rowsF,
                        feature: rows64):
    """Each level of the grid, interpolated at each sample:

        feature[i][F l + c] = sum over the 8 corners v of the cell around i  w_v table[slot_l(v)][c],    F = N_FEATURES

    w_v are corner_weights, slot_l(v) corner_slots; vertices lie at multiples of 1 / resolution.
    counter  [4]                        in
    level    [n_levels, 4]              in    resolution (cells per side), first slot, number of slots, 1 if hashed
    sample   [n_samples, 5]             in    position, in the cube
    table    [n_slots] rows of F        in    the first rows of the parameters
    feature  [n_samples] rows of 64     out   the first F n_levels entries
    thread   one per (level, sample), level by level: one level's slots stay in the cache
    """
    for t in range(n_levels * counter[0]):
        encode_level(t // counter[0], t % counter[0], level, sample, table, feature)


@ti.kernel
def clear_gradients(n: ti.i32, first: ti.i32, grad_params: rowsF):
    """grad_params = 0, in the n rows from `first` on. The hash table's are cleared right before hash_encode_backward
    adds to them here and there: they have left the cache since the last step, and in order they come back much faster.

    grad_params  [n_rows] rows of F  out
    thread       one per row
    """
    for t in range(first, first + n):
        grad_params[t] = rowF(0.0)


@ti.kernel
def hash_encode_backward(n_levels: ti.i32, n_chunks: ti.i32, chunk: ti.i32, counter: i32buf, level: i32buf,
                         sample: f32buf, grad_feature: rows64, grad_table: rowsF):
    """The transpose of hash_encode_forward, which is linear in the table:

        grad_table[slot_l(v)][c] += w_v grad_feature[i][F l + c]      for every sample i and corner v of its cell

    n_chunks chunks of `chunk` samples each, at least as many as there are samples.
    counter, level, sample                in      as in hash_encode_forward
    grad_feature  [n_samples] rows of 64  in
    grad_table    [n_slots] rows of F     in-out
    thread   one per (level, chunk of samples), the finest level first
    atomic   f32 add on grad_table, unless one chunk holds all samples: then a level has one writer, and plain adds, in
             sample order, are faster on a CPU and exactly repeatable
    """
    for t in range(n_levels * n_chunks):
        l = n_levels - 1 - t // n_chunks             # the finest takes longest: other threads do the rest meanwhile
        first = t % n_chunks * chunk
        for i in range(first, ti.min(first + chunk, counter[0])):
            g = rowF(0.0)
            for c in ti.static(range(N_FEATURES)):
                g[c] = grad_feature[i][N_FEATURES * l + c]
            cell, fraction = locate(i, sample, level[4 * l])
            weight, slots = corner_weights(fraction), corner_slots(l, level, cell)
            for corner in ti.static(range(8)):
                slot = ti.cast(slots[corner], ti.i32)
                if chunk >= counter[0]:
                    grad_table[slot] = grad_table[slot] + weight[corner] * g
                else:
                    for c in ti.static(range(N_FEATURES)):
                        ti.atomic_add(grad_table[slot][c], weight[corner] * g[c])


# ---- MLP: n_hidden hidden layers y = relu(x W), 64 wide, and an output layer y = x W of n_out <= 16 columns; without
# biases. The density MLP is F n_levels -> 64 -> 16, the color MLP 32 (and a code) -> 64 -> 3 or -> 64 -> 64 -> 3. A
# sample passes all layers in one thread: what a layer has written is still in the cache when the next one reads it. In
# `params` an MLP is a list of rows of 64: n_rows = n_in + 64 (n_hidden - 1) rows of the hidden layers' W, one layer
# below the other, then the n_out rows of the output layer's W^T. Before use they are copied into wider rows:
#     weight      [n_rows + n_out] rows of 64       W of the hidden layers, and W^T of the output layer, as in `params`
#     weight_out  [64] rows of 16                   W of the output layer
#     weight_t    [64 n_hidden + 16] rows of 64     W^T of all layers
# hidden [n_hidden, capacity] rows of 64 is what the ReLUs put out, layer by layer. grad_hidden means "before the ReLU":
# it is zero where hidden is zero.

@ti.kernel
def load_weights(n_in: ti.i32, n_hidden: ti.i32, n_out: ti.i32, first: ti.i32, params: rowsF, weight: rows64,
                 weight_t: rows64, weight_out: rows16):
    """Weights of an MLP, the numbers of `params` from `first` on, as rows.

    params                         [n_param_rows] rows of F  in
    weight, weight_t, weight_out   see above                 out   what belongs to inputs beyond n_in and outputs beyond
                                                                   n_out is not written: the host zeroed it
    thread   one per weight
    """
    n_rows = n_in + WIDTH * (n_hidden - 1)
    for t in range((n_rows + n_out) * WIDTH):
        w = params[(first + t) // N_FEATURES][(first + t) % N_FEATURES]
        row, column = t // WIDTH, t % WIDTH
        weight[row][column] = w
        if row < n_rows:
            if row < n_in:
                weight_t[column][row] = w
            else:
                weight_t[((row - n_in) // WIDTH + 1) * WIDTH + column][(row - n_in) % WIDTH] = w
        else:
            weight_out[column][row - n_rows] = w
            weight_t[WIDTH * n_hidden + row - n_rows][column] = w


@ti.func
def row_times_matrix(x: ti.template(), i, n_in, weight: ti.template(), first, total):
    """total + sum_j x[i][j] weight[first + j]: the inner loop of a layer, and of the gradient of its input."""
    for j in range(n_in):
        total += x[i][j] * weight[first + j]
    return total


@ti.kernel
def mlp_forward(n_in: ti.i32, n_hidden: ti.i32, capacity: ti.i32, counter: i32buf, x: rows64, weight: rows64,
                weight_out: rows16, hidden: rows64, y: rows16):
    """hidden_0 = relu(x W_0), hidden_l = relu(hidden_{l-1} W_l), y = hidden_last W_out

    counter     [4]                               in
    x           [n_samples] rows of 64            in    the first n_in entries
    weight, weight_out                            in    from load_weights
    hidden      [n_hidden, capacity] rows of 64   out
    y           [n_samples] rows of 16            out   entries beyond the MLP's outputs are 0
    thread      one per sample: 64 sums in registers, each weight row loaded once
    """
    for i in range(counter[0]):
        hidden[i] = ti.max(row_times_matrix(x, i, n_in, weight, 0, row64(0.0)), 0.0)
        h = i
        for l in range(1, n_hidden):
            first = n_in + WIDTH * (l - 1)
            hidden[h + capacity] = ti.max(row_times_matrix(hidden, h, WIDTH, weight, first, row64(0.0)), 0.0)
            h += capacity
        y[i] = row_times_matrix(hidden, h, WIDTH, weight_out, 0, row16(0.0))


@ti.kernel
def mlp_backward_input(n_hidden: ti.i32, n_out: ti.i32, capacity: ti.i32, counter: i32buf, hidden: rows64,
                       weight_t: rows64, grad_y: rows16, grad_hidden: rows64, grad_x: rows64):
    """The layers from last to first, each grad_input = grad_output W^T, and 0 where a ReLU put out 0:

        grad_hidden_last = grad_y W_out^T,   grad_hidden_{l-1} = grad_hidden_l W_l^T,   grad_x = grad_hidden_0 W_0^T

    counter      [4]                               in
    hidden       [n_hidden, capacity] rows of 64   in
    weight_t                                       in
    grad_y       [n_samples] rows of 16            in    the first n_out entries
    grad_hidden  [n_hidden, capacity] rows of 64   out
    grad_x       [n_samples] rows of 64            out
    thread       one per sample
    """
    for i in range(counter[0]):
        g = row_times_matrix(grad_y, i, n_out, weight_t, WIDTH * n_hidden, row64(0.0))
        for back in range(n_hidden):
            l = n_hidden - 1 - back
            h = l * capacity + i
            grad_hidden[h] = ti.select(hidden[h] > 0.0, g, row64(0.0))
            g = row_times_matrix(grad_hidden, h, WIDTH, weight_t, WIDTH * l, row64(0.0))
        grad_x[i] = g


@ti.func
def column_times_matrix(x: ti.template(), first_x, j, y: ti.template(), first_y, begin, end):
    """sum_{begin <= i < end} x[first_x + i][j] y[first_y + i]: a row of x^T y."""
    total = row64(0.0)
    for i in range(begin, end):
        total += x[first_x + i][j] * y[first_y + i]
    return total


@ti.kernel
def mlp_backward_weight(n_in: ti.i32, n_hidden: ti.i32, n_out: ti.i32, capacity: ti.i32, chunk: ti.i32, pitch: ti.i32,
                        first: ti.i32, counter: i32buf, x: rows64, hidden: rows64, grad_hidden: rows64, grad_y: rows16,
                        partial: rowsF):
    """grad_W[j] = sum_i input_i[j] grad_output_i, summed over chunks of samples; sum_partials adds the chunks.

    Of the output layer it is the transpose, grad_W_out^T[o] = sum_i grad_y_i[o] hidden_i: always rows of 64.
    n_chunks = ceil(counter[0] / chunk), and each has `pitch` rows of `partial`, in the order of `params`.
    counter      [4]                               in
    x            [n_samples] rows of 64            in
    hidden       [n_hidden, capacity] rows of 64   in
    grad_hidden  [n_hidden, capacity] rows of 64   in
    grad_y       [n_samples] rows of 16            in
    partial      [n_chunks, pitch] rows of F       out   this MLP's rows of each chunk, from `first` on
    thread       one per (chunk, row of the MLP in `params`): 64 sums in registers; the threads of a chunk share its
                 samples in the cache
    """
    n_rows = n_in + WIDTH * (n_hidden - 1)
    for t in range((counter[0] + chunk - 1) // chunk * (n_rows + n_out)):
        row = t % (n_rows + n_out)
        begin = t // (n_rows + n_out) * chunk
        end = ti.min(begin + chunk, counter[0])
        total = row64(0.0)
        if row < n_in:
            total = column_times_matrix(x, 0, row, grad_hidden, 0, begin, end)
        elif row < n_rows:
            l, j = (row - n_in) // WIDTH, (row - n_in) % WIDTH
            total = column_times_matrix(hidden, l * capacity, j, grad_hidden, (l + 1) * capacity, begin, end)
        else:
            total = column_times_matrix(grad_y, 0, row - n_rows, hidden, (n_hidden - 1) * capacity, begin, end)
        at = t // (n_rows + n_out) * pitch + first + row * (WIDTH // N_FEATURES)
        for c in ti.static(range(WIDTH)):
            partial[at + c // N_FEATURES][c % N_FEATURES] = total[c]


@ti.kernel
def sum_partials(n: ti.i32, chunk: ti.i32, pitch: ti.i32, first: ti.i32, counter: i32buf, partial: rowsF,
                 grad_params: rowsF):
    """grad_params += the partial sums of all chunks, in order.

    counter      [4]                          in
    partial      [n_chunks, pitch] rows of F  in      pitch >= n; no multiple of 256, or a column shares one cache set
    grad_params  [n_rows] rows of F           in-out  n rows from `first` on
    thread       one per row
    """
    for j in range(n):
        total = rowF(0.0)
        for b in range((counter[0] + chunk - 1) // chunk):
            total += partial[b * pitch + j]
        grad_params[first + j] = grad_params[first + j] + total


# ---- Visibility: most of what is marched lies behind a surface or in air. A probe follows each ray, finding density
# alone, until no light is left; the samples that light reaches, and that stop some of it, are kept: their counts are
# scanned into new spans, they are copied together, and only they take part in what follows, forward and backward.
# (instant-ngp compacts its samples too before each training step.)

@ti.func
def density_at(i, n_in, x: ti.template(), weight: ti.template()):
    """What mlp_forward and density_head_forward make of an MLP with one hidden layer, of the first output alone and
    without storing what is between: exp(min(relu(x[i] W) . w, RAW_SIGMA_MAX)), where `weight` has the n_in rows of W
    and then w, the first row of W_out^T."""
    hidden = ti.max(row_times_matrix(x, i, n_in, weight, 0, row64(0.0)), 0.0)
    return ti.exp(ti.min(hidden.dot(weight[n_in]), RAW_SIGMA_MAX))


@ti.kernel
def probe_density(n_in: ti.i32, counter: i32buf, x: rows64, weight: rows64, sigma: f32buf):
    """sigma[i] = density_at(i), of points that belong to no ray.

    counter  [4]                    in
    x        [n_samples] rows of 64 in    from hash_encode_forward, the first n_in entries
    weight                          in    from load_weights
    sigma    [n_samples]            out   density, per side of the cube
    thread   one per sample
    """
    for i in range(counter[0]):
        sigma[i] = density_at(i, n_in, x, weight)


@ti.kernel
def probe_rays(n_rays: ti.i32, n_levels: ti.i32, n_in: ti.i32, min_weight: ti.f32, march_span: i32buf, level: i32buf,
               march_sample: f32buf, params: rowsF, weight: rows64, pixel: f32buf, march_feature: rows64,
               march_sigma: f32buf):
    """hash_encode_forward and probe_density, sample by sample along each ray, until its light is used up: what is
    marched behind that, often more than half, is not probed.

    Kept are samples that add light to their pixel, whose weight T_k alpha_k (see composite_forward) is at least
    min_weight, and whose sigma is not 0. The others dim nothing, so that T is what composite_forward will find.

    march_span     [n_rays, 2]             in      first sample, number of samples, of those marched
    level          [n_levels, 4]           in      see hash_encode_forward
    march_sample   [n_marched, 5]          in      position, in the cube; [4] = dt
    params         [n_rows] rows of F      in      the table comes first
    weight                                 in      from load_weights
    pixel          [n_rays, 4]             in      [3] = T, what earlier waves let through
    march_feature  [n_marched] rows of 64  in-out  the F n_levels first entries are written, where T >= T_STOP; what
                                                   an MLP has more of inputs lies behind (ambient_forward)
    march_sigma    [n_marched]             out     density of the samples that are kept; 0: not kept; -1: not probed
    thread         one per ray
    """
    for r in range(n_rays):
        T = pixel[4 * r + 3]
        first = march_span[2 * r]
        for i in range(first, first + march_span[2 * r + 1]):
            march_sigma[i] = -1.0
            if T >= T_STOP:
                for l in range(n_levels):
                    encode_level(l, i, level, march_sample, params, march_feature)
                sigma = density_at(i, n_in, march_feature, weight)
                alpha = 1.0 - ti.exp(-sigma * march_sample[5 * i + 4])
                march_sigma[i] = 0.0
                if T * alpha >= min_weight:
                    march_sigma[i] = sigma
                    T *= 1.0 - alpha


@ti.kernel
def count_visible_samples(n_rays: ti.i32, march_span: i32buf, march_sigma: f32buf, ray_span: i32buf):
    """How many samples of each ray are kept: what probe_rays could say, had it not 8 buffers already.

    march_span   [n_rays, 2]  in
    march_sigma  [n_marched]  in    from probe_rays
    ray_span     [n_rays, 2]  out   [1] = number of samples that are kept
    thread       one per ray
    """
    for r in range(n_rays):
        count = 0
        first = march_span[2 * r]
        for i in range(first, first + march_span[2 * r + 1]):
            if march_sigma[i] > 0.0:
                count += 1
        ray_span[2 * r + 1] = count


@ti.kernel
def mark_lit_cells(n_rays: ti.i32, grid_size: ti.i32, step: ti.i32, march_span: i32buf, march_sample: f32buf,
                   march_sigma: f32buf, lit_step: i32buf):
    """Remember the cells that the light of this training step has reached: those of all samples in front of the early
    stop, of the one that stops it, too.

    march_span    [n_rays, 2]    in
    march_sample  [n_marched, 5] in      contracted
    march_sigma   [n_marched]    in      from probe_rays: not negative where light came
    lit_step      [grid_size^3]  in-out  the last step in which light reached the cell
    thread        one per ray
    atomic        none: an entry may have several writers, but they all write `step`
    """
    for r in range(n_rays):
        first = march_span[2 * r]
        for i in range(first, first + march_span[2 * r + 1]):
            if march_sigma[i] < 0.0:
                break
            cell, _ = locate(i, march_sample, grid_size)
            lit_step[cell_number(cell[0], cell[1], cell[2], grid_size)] = step


@ti.kernel
def keep_visible_samples(n_rays: ti.i32, march_span: i32buf, march_sample: f32buf, march_feature: rows64,
                         march_sigma: f32buf, ray_span: i32buf, sample: f32buf, feature: rows64, sample_ray: i32buf):
    """Copy the samples that are kept, with their features, into buffers without gaps, in ray order. These are as large
    as those of the march: no ray's samples can be left without room.

    march_span     [n_rays, 2]             in
    march_sample   [n_marched, 5]          in
    march_feature  [n_marched] rows of 64  in
    march_sigma    [n_marched]             in    from probe_rays: positive where the sample is kept
    ray_span       [n_rays, 2]             in    from claim_spans
    sample         [n_samples, 5]          out   position, t, dt
    feature        [n_samples] rows of 64  out
    sample_ray     [n_samples]             out   r
    thread         one per ray
    """
    for r in range(n_rays):
        i = ray_span[2 * r]
        first = march_span[2 * r]
        for j in range(first, first + march_span[2 * r + 1]):
            if march_sigma[j] > 0.0:
                for c in ti.static(range(5)):
                    sample[5 * i + c] = march_sample[5 * j + c]
                feature[i] = march_feature[j]
                sample_ray[i] = r
                i += 1


# ---- Heads: from what the MLPs put out to density and color; and the color MLP's input, where the density MLP's output
# meets the direction of view. Here two gradients meet on the way back: density_head_backward adds them.

@ti.kernel
def density_head_forward(counter: i32buf, geometry: rows16, rgb_sigma: f32buf):
    """sigma[i] = exp(geometry[i][0]), guarded: exp(min(., RAW_SIGMA_MAX)), since e^89 overflows.

    counter    [4]                     in
    geometry   [n_samples] rows of 16  in    output of the density MLP
    rgb_sigma  [n_samples, 4]          out   [3]
    thread     one per sample
    """
    for i in range(counter[0]):
        rgb_sigma[4 * i + 3] = ti.exp(ti.min(geometry[i][0], RAW_SIGMA_MAX))


@ti.kernel
def density_head_backward(counter: i32buf, rgb_sigma: f32buf, grad_rgb_sigma: f32buf, grad_color_input: rows64,
                          grad_geometry: rows16):
    """grad_geometry[i] = grad_color_input[i][:16] + (sigma grad_sigma, 0, ..., 0)

    The slope of exp is sigma. Beyond the guard it is kept, e^RAW_SIGMA_MAX, so that a value can come back.
    counter           [4]                     in
    rgb_sigma         [n_samples, 4]          in    [3] = sigma
    grad_rgb_sigma    [n_samples, 4]          in    [3]
    grad_color_input  [n_samples] rows of 64  in    the first 16 entries
    grad_geometry     [n_samples] rows of 16  out
    thread            one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(OUTPUT)):
            grad_geometry[i][c] = grad_color_input[i][c]
        grad_geometry[i][0] = grad_color_input[i][0] + rgb_sigma[4 * i + 3] * grad_rgb_sigma[4 * i + 3]


@ti.kernel
def color_input_forward(n_code: ti.i32, first: ti.i32, counter: i32buf, geometry: rows16, sample_ray: i32buf,
                        ray: f32buf, ray_code: i32buf, params: rowsF, color_input: rows64):
    """color_input[i] = (geometry[i], Y(direction), CODE_SCALE code[ray_code]): what the density MLP says, the 16 real
    spherical harmonics of bands 0 to 3, and n_code numbers that are learned for each photograph, for what differs
    between photographs of one scene, such as exposure and white balance (Martin-Brualla et al. 2021, "NeRF in the
    Wild", section 4.1; n_code = 0 where photographs agree).

    Constants: Sloan 2008, "Stupid Spherical Harmonics Tricks", appendix A2. Cameras are given, so no gradient goes to
    the direction; that of geometry is taken up by density_head_backward, that of the code by code_backward.
    counter      [4]                       in
    geometry     [n_samples] rows of 16    in
    sample_ray   [n_samples]               in
    ray          [n_rays, 8]               in    [4:7] = direction
    ray_code     [n_rays]                  in
    params       [n_param_rows] rows of F  in    numbers from `first` on: code [n_views + 1, n_code]
    color_input  [n_samples] rows of 64    out   the first 32 + n_code entries
    thread       one per sample
    """
    for i in range(counter[0]):
        r = sample_ray[i]
        x, y, z = ray[8 * r + 4], ray[8 * r + 5], ray[8 * r + 6]
        Y = ti.Vector([
            0.28209479, -0.48860251 * y, 0.48860251 * z, -0.48860251 * x,
            1.09254843 * x * y, -1.09254843 * y * z, 0.31539157 * (3.0 * z * z - 1.0), -1.09254843 * x * z,
            0.54627422 * (x * x - y * y), -0.59004359 * y * (3.0 * x * x - y * y), 2.89061144 * x * y * z,
            -0.45704580 * y * (5.0 * z * z - 1.0), 0.37317633 * z * (5.0 * z * z - 3.0),
            -0.45704580 * x * (5.0 * z * z - 1.0), 1.44530572 * z * (x * x - y * y),
            -0.59004359 * x * (x * x - 3.0 * y * y)])
        for c in ti.static(range(OUTPUT)):
            color_input[i][c] = geometry[i][c]
            color_input[i][OUTPUT + c] = Y[c]
        for c in range(n_code):
            at = first + n_code * ray_code[r] + c
            color_input[i][2 * OUTPUT + c] = CODE_SCALE * params[at // N_FEATURES][at % N_FEATURES]


@ti.kernel
def code_backward(n_code: ti.i32, first: ti.i32, n_chunks: ti.i32, chunk: ti.i32, counter: i32buf, sample_ray: i32buf,
                  ray_code: i32buf, grad_color_input: rows64, grad_params: rowsF):
    """grad_code[c] += CODE_SCALE sum of grad_color_input[i][32:32 + n_code] over the samples i of rays with code c

    n_chunks chunks of `chunk` samples each, at least as many as there are samples.
    counter           [4]                       in
    sample_ray        [n_samples]               in
    ray_code          [n_rays]                  in
    grad_color_input  [n_samples] rows of 64    in
    grad_params       [n_param_rows] rows of F  in-out  numbers from `first` on
    thread   one per chunk of samples
    atomic   f32 add on grad_params, unless one chunk holds all samples, as in hash_encode_backward
    """
    for t in range(n_chunks):
        for i in range(t * chunk, ti.min((t + 1) * chunk, counter[0])):
            for c in range(n_code):
                at = first + n_code * ray_code[sample_ray[i]] + c
                g = CODE_SCALE * grad_color_input[i][2 * OUTPUT + c]
                if chunk >= counter[0]:
                    grad_params[at // N_FEATURES][at % N_FEATURES] = grad_params[at // N_FEATURES][at % N_FEATURES] + g
                else:
                    ti.atomic_add(grad_params[at // N_FEATURES][at % N_FEATURES], g)


@ti.func
def sigmoid(x):
    """1 / (1 + exp(-x)). Not clamped: what is no number has to stay none, up to the loss."""
    return 1.0 / (1.0 + ti.exp(-x))


@ti.kernel
def color_head_forward(margin: ti.f32, counter: i32buf, color_raw: rows16, rgb_sigma: f32buf):
    """rgb[i] = (1 + 2 margin) sigmoid(color_raw[i][:3]) - margin

    margin     by which colors reach beyond [0, 1]: 0 but for mip-NeRF's
    counter    [4]                     in
    color_raw  [n_samples] rows of 16  in    output of the color MLP: the first 3 entries
    rgb_sigma  [n_samples, 4]          out   [0:3]
    thread     one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(3)):
            rgb_sigma[4 * i + c] = (1.0 + 2.0 * margin) * sigmoid(color_raw[i][c]) - margin


@ti.kernel
def color_head_backward(margin: ti.f32, counter: i32buf, rgb_sigma: f32buf, grad_rgb_sigma: f32buf,
                        grad_color_raw: rows16):
    """grad_color_raw[i] = (1 + 2 margin) s (1 - s) grad_rgb, where s = (rgb + margin) / (1 + 2 margin) is the sigmoid

    composite_backward takes colors to be in [0, 1]: what it finds behind a sample is off by up to margin T.
    counter         [4]                     in
    rgb_sigma       [n_samples, 4]          in
    grad_rgb_sigma  [n_samples, 4]          in    [0:3]
    grad_color_raw  [n_samples] rows of 16  out   the first 3 entries
    thread          one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(3)):
            s = (rgb_sigma[4 * i + c] + margin) / (1.0 + 2.0 * margin)
            grad_color_raw[i][c] = (1.0 + 2.0 * margin) * s * (1.0 - s) * grad_rgb_sigma[4 * i + c]


# ---- Volume rendering (Max 1995; Mildenhall et al. 2020, "NeRF", equation 3)

@ti.kernel
def composite_forward(n_rays: ti.i32, ray_span: i32buf, sample: f32buf, rgb_sigma: f32buf, pixel: f32buf,
                      depth: f32buf):
    """Front-to-back sum over the samples of each ray, on top of what earlier waves have gathered:

        alpha_k = 1 - exp(-sigma_k dt_k)
        T_{k+1} = T_k (1 - alpha_k)                 light that gets past sample k; T_0 = pixel[3]
        pixel  += sum_k T_k alpha_k rgb_k           until T_k < T_STOP; pixel[3] = T_end
        depth  += sum_k T_k alpha_k t_k

    ray_span   [n_rays, 2]     in      first sample, number of samples
    sample     [n_samples, 5]  in      [3] = t, [4] = dt
    rgb_sigma  [n_samples, 4]  in
    pixel      [n_rays, 4]     in-out  red, green, blue without the background, T
    depth      [n_rays]        in-out
    thread     one per ray
    """
    for r in range(n_rays):
        T = pixel[4 * r + 3]
        color = vec3(pixel[4 * r], pixel[4 * r + 1], pixel[4 * r + 2])
        distance = depth[r]
        first = ray_span[2 * r]
        for i in range(first, first + ray_span[2 * r + 1]):
            if T < T_STOP:
                break
            alpha = 1.0 - ti.exp(-rgb_sigma[4 * i + 3] * sample[5 * i + 4])
            for c in ti.static(range(3)):
                color[c] += T * alpha * rgb_sigma[4 * i + c]
            distance += T * alpha * sample[5 * i + 3]
            T *= 1.0 - alpha
        for c in ti.static(range(3)):
            pixel[4 * r + c] = color[c]
        pixel[4 * r + 3] = T
        depth[r] = distance


@ti.kernel
def composite_backward(n_rays: ti.i32, ray_span: i32buf, sample: f32buf, rgb_sigma: f32buf, pixel: f32buf,
                       grad_pixel: f32buf, grad_rgb_sigma: f32buf):
    """Gradient of composite_forward for a single wave, from T_0 = 1. Let behind_k be the light from samples after k:

        behind_k     = pixel - sum_{m<=k} T_m alpha_m rgb_m
        grad_rgb_k   = T_k alpha_k grad_pixel
        grad_sigma_k = dt_k ((T_{k+1} rgb_k - behind_k) . grad_pixel - T_end grad_T)

    Raising sigma_k adds T_{k+1} dt of its own color, and hides dt of what is behind it: later samples and background.
    It walks forwards again and recomputes T, which costs less than storing it; depth gets no gradient.
    ray_span        [n_rays, 2]     in
    sample          [n_samples, 5]  in    [4] = dt
    rgb_sigma       [n_samples, 4]  in
    pixel           [n_rays, 4]     in    from composite_forward: color without background, T_end
    grad_pixel      [n_rays, 4]     in    [3] = grad_T: T_end lets the background through
    grad_rgb_sigma  [n_samples, 4]  out   0 behind the early stop
    thread          one per ray, which owns its samples
    """
    for r in range(n_rays):
        T = 1.0
        behind = vec3(pixel[4 * r], pixel[4 * r + 1], pixel[4 * r + 2])
        first = ray_span[2 * r]
        for i in range(first, first + ray_span[2 * r + 1]):
            for c in ti.static(range(4)):
                grad_rgb_sigma[4 * i + c] = 0.0
            if T >= T_STOP:
                alpha = 1.0 - ti.exp(-rgb_sigma[4 * i + 3] * sample[5 * i + 4])
                w = T * alpha
                T *= 1.0 - alpha
                gain = -pixel[4 * r + 3] * grad_pixel[4 * r + 3]
                for c in ti.static(range(3)):
                    # Of what is behind, T gets through: no rounding beyond that, since an opaque sample has a large dt
                    # sigma, which would blow it up.
                    behind[c] = ti.math.clamp(behind[c] - w * rgb_sigma[4 * i + c], 0.0, T)
                    grad_rgb_sigma[4 * i + c] = w * grad_pixel[4 * r + c]
                    gain += (T * rgb_sigma[4 * i + c] - behind[c]) * grad_pixel[4 * r + c]
                grad_rgb_sigma[4 * i + 3] = sample[5 * i + 4] * gain


# ---- Distortion loss (Barron et al. 2022, "Mip-NeRF 360", equation 15; in linear time as in Sun et al. 2022, "Improved
# Direct Voxel Grid Optimization"): draws the light of a ray together, against fog and floaters near the camera.

@ti.func
def place_on_ray(t, dt):
    """Middle s and length ds of the part of a ray from t - dt/2 to t + dt/2, measured such that all of the ray is as
    long as 1: s(t) = t / (t + RADIUS), near the camera almost even, far away disparity. Parts may be long."""
    square = (t + RADIUS) * (t + RADIUS) - 0.25 * dt * dt
    return 1.0 - RADIUS * (t + RADIUS) / square, dt * RADIUS / square


@ti.kernel
def distortion_loss(n_rays: ti.i32, strength: ti.f32, counter: i32buf, ray_span: i32buf, sample: f32buf,
                    rgb_sigma: f32buf, grad_rgb_sigma: f32buf):
    """How far apart the weights w_k = T_k alpha_k of a ray are (see composite_forward and place_on_ray), and the
    gradient of that, on top of that of composite_backward:

        D   = sum_k sum_m w_k w_m |s_k - s_m| + 1/3 sum_k w_k^2 ds_k
            = sum_k 2 w_k (s_k sum_{m<k} w_m - sum_{m<k} w_m s_m) + 1/3 w_k^2 ds_k           samples come in order
        L   = strength / N sum_r D_r                                                         N = counter[1]
        g_k = dD/dw_k = 2 sum_m w_m |s_k - s_m| + 2/3 w_k ds_k
        grad_sigma_k += strength / N dt_k (T_{k+1} g_k - sum_{m>k} w_m g_m)

    A first walk sums D, w_k and w_k s_k; a second has g_k from what is before and what is left of them. D is of
    degree 2 in the weights, hence sum_m w_m g_m = 2 D, and the sum behind k is what is left of that.
    counter         [4]             in      [1] = N, the rays that were not dropped
    ray_span        [n_rays, 2]     in
    sample          [n_samples, 5]  in      [3] = t, [4] = dt
    rgb_sigma       [n_samples, 4]  in      [3] = sigma
    grad_rgb_sigma  [n_samples, 4]  in-out  [3]
    thread          one per ray, which owns its samples
    """
    for r in range(n_rays):
        first, end = ray_span[2 * r], ray_span[2 * r] + ray_span[2 * r + 1]
        T, D, all_weight, all_moment = 1.0, 0.0, 0.0, 0.0
        for i in range(first, end):
            if T < T_STOP:
                break
            alpha = 1.0 - ti.exp(-rgb_sigma[4 * i + 3] * sample[5 * i + 4])
            s, ds = place_on_ray(sample[5 * i + 3], sample[5 * i + 4])
            w = T * alpha
            D += 2.0 * w * (s * all_weight - all_moment) + w * w * ds / 3.0
            all_weight += w
            all_moment += w * s
            T *= 1.0 - alpha
        scale = strength / ti.max(counter[1], 1)
        T = 1.0
        behind, weight, moment = 2.0 * D, 0.0, 0.0
        for i in range(first, end):
            if T < T_STOP:
                break
            alpha = 1.0 - ti.exp(-rgb_sigma[4 * i + 3] * sample[5 * i + 4])
            s, ds = place_on_ray(sample[5 * i + 3], sample[5 * i + 4])
            w = T * alpha
            T *= 1.0 - alpha
            # s (weight before - weight behind) - (moment before - moment behind): the w s of both cancel
            g = 2.0 * (s * (2.0 * weight - all_weight) - (2.0 * moment - all_moment)) + 2.0 / 3.0 * w * ds
            weight += w
            moment += w * s
            behind = ti.math.clamp(behind - w * g, 0.0, 3.0 * T)     # no rounding beyond that: g < 3
            grad_rgb_sigma[4 * i + 3] = grad_rgb_sigma[4 * i + 3] + scale * sample[5 * i + 4] * (T * g - behind)


# ---- Loss and optimiser ---------------------------------------------------------------------------------------------

@ti.kernel
def loss_and_gradient(n_rays: ti.i32, share: ti.f32, random_background: ti.i32, masked: ti.i32, seed: ti.i32,
                      step: ti.i32, counter: i32buf, ray_pixel: i32buf, image: u32buf, ray_step: i32buf,
                      pixel: f32buf, loss: f32buf, grad_pixel: f32buf, bad_step: i32buf):
    """Squared error of each ray's color against its photograph, both over the same background:

        color  = pixel + T background            target = a image + (1 - a) background
        L      = share/(3 N) sum_r |color - target|^2                           N = counter[1], rays not dropped
        grad_pixel = 2 share/(3 N) (color - target),   grad_T = grad_pixel . background

    L2, since it is the error that PSNR measures. The background is a new random color per ray and step where
    images have alpha (a wrong opacity then shows against some colors) and where nothing is behind the scene (what lets
    it through is wrong), white otherwise. Where `masked`, alpha says instead which pixels count: those of 1. Rays that
    ended in a dark cell before their light was used up do not count: it would go on. share is 1 but for mip-NeRF's
    coarse pixels.
    counter     [4]                  in
    ray_pixel   [n_rays]             in
    image       [pixels of all views] in   one word a pixel: red in the lowest byte, then green, blue, straight alpha
    ray_step    [n_rays]             in    END or DARK: how the ray ended; less where it was dropped
    pixel       [n_rays, 4]          in    from composite_forward
    loss        [n_rays]             out   |color - target|^2 / 3; 0 where the ray does not count
    grad_pixel  [n_rays, 4]          out   0 where the ray does not count
    bad_step    [1]                  in-out  the first step whose loss is infinite or not a number, so far
    thread      one per ray
    atomic      i32 min on bad_step, where that happens
    """
    for r in range(n_rays):
        word = image[ray_pixel[r]]
        a = ti.cast(word >> 24, ti.f32) / 255.0
        counts = 1.0
        if ray_step[r] < END or (ray_step[r] == DARK and pixel[4 * r + 3] >= T_STOP) or (masked == 1 and a < 1.0):
            counts = 0.0
        scale = share * counts / (3.0 * ti.max(counter[1], 1))
        grad_T = 0.0
        total = 0.0
        for c in ti.static(range(3)):
            background = ti.select(random_background == 1, random_f32(seed, STREAM_BACKGROUND + c, step, r), 1.0)
            truth = ti.cast((word >> (8 * c)) & ti.u32(255), ti.f32) / 255.0
            error = pixel[4 * r + c] + pixel[4 * r + 3] * background - (a * truth + (1.0 - a) * background)
            total += error * error / 3.0
            grad_pixel[4 * r + c] = 2.0 * scale * error
            grad_T += 2.0 * scale * error * background
        grad_pixel[4 * r + 3] = grad_T
        loss[r] = counts * total
        if (ti.bit_cast(total, ti.u32) >> 23) & ti.u32(255) == ti.u32(255):      # fast math believes no comparison
            ti.atomic_min(bad_step[0], step)


@ti.kernel
def adam_step(n: ti.i32, first: ti.i32, learning_rate: ti.f32, beta_1: ti.f32, beta_2: ti.f32, epsilon: ti.f32,
              params: rowsF, grad: rowsF, moment: rowsF):
    """Adam (Kingma and Ba 2015), on n rows from `first` on, for the entries that have a gradient; the others, most of a
    hash table, are left alone, moments included (instant-ngp does so in the table; here weights are no exception).

        m = beta_1 m + (1 - beta_1) g      v = beta_2 v + (1 - beta_2) g^2
        params -= learning_rate m / (sqrt(v) + epsilon)

    The bias corrections sqrt(1 - beta_2^s) / (1 - beta_1^s) of step s, one count for all entries, are a factor that the
    host puts into learning_rate. Rows without any gradient are read and written, too: skipping them takes a CPU twice
    as long, since it cannot foresee which ones they are.
    params  [n_rows] rows of F     in-out
    grad    [n_rows] rows of F     in
    moment  [n_rows, 2] rows of F  in-out  m, v
    thread  one per row
    """
    for t in range(first, first + n):
        g = grad[t]
        m = ti.select(g == 0.0, moment[2 * t], beta_1 * moment[2 * t] + (1.0 - beta_1) * g)
        v = ti.select(g == 0.0, moment[2 * t + 1], beta_2 * moment[2 * t + 1] + (1.0 - beta_2) * g * g)
        moment[2 * t] = m
        moment[2 * t + 1] = v
        params[t] = params[t] + ti.select(g == 0.0, rowF(0.0), -learning_rate * m / (ti.sqrt(v) + epsilon))


# ---- Mesh: the surface on which `opacity`, the share of light that a given length would take, is 1/2, by marching
# tetrahedra (Doi and Koide 1991). The lattice has n = n_side points along each side, numbered x + n (y + n z). Each of
# its cubes is cut into six tetrahedra around the same diagonal, so that neighbours agree on the faces that they share.
# An edge leads from a lattice point p to p + corner_offset(d), d = 1..7, and belongs to p; it carries a vertex of the
# mesh if only one of its ends is inside. Opacity is 0 on the walls of the lattice: the mesh has no border.

@ti.func
def lattice_point(p, n_side):
    """Coordinates of a lattice point, from its number."""
    return ti.Vector([p % n_side, p // n_side % n_side, p // (n_side * n_side)])


@ti.func
def corner_offset(corner, n_side):
    """From a lattice point to the corner 0..7 of the cube above it, numbered as in corner_slots."""
    return (corner & 1) + n_side * ((corner >> 1 & 1) + n_side * (corner >> 2))


@ti.func
def corners_inside(p, n_side, opacity: ti.template()):
    """Bit c: is corner c of the cube above lattice point p inside, its opacity above 1/2? 0 for points of the upper
    walls: no cube, no edge that carries a vertex."""
    bits = 0
    if lattice_point(p, n_side).max() < n_side - 1:
        for corner in ti.static(range(8)):
            if opacity[p + corner_offset(corner, n_side)] > 0.5:
                bits |= 1 << corner
    return bits


@ti.func
def edges_crossed(bits):
    """Bit d = 1..7: does the edge d of a lattice point carry a vertex? bits: from corners_inside."""
    return (bits ^ ti.select(bits & 1 == 1, 255, 0)) & 254


@ti.func
def count_bits(bits):
    """Number of bits that are set, of the lower 8."""
    total = 0
    for c in ti.static(range(8)):
        total += bits >> c & 1
    return total


@ti.func
def tetrahedron(number, bits):
    """Corners of tetrahedron 0..5 of a cube with those inside first, three bits each; how many are inside; and whether
    that order is mirrored. Its corners are 0, one step along an axis, a second one along another, and 7."""
    first, second = number // 2, (number // 2 + 1 + number % 2) % 3
    corners = 1 << (3 + first) | (1 << first | 1 << second) << 6 | 7 << 9
    inside, outside, n_inside, mirrored = 0, 0, 0, number % 2
    for slot in ti.static(range(4)):
        corner = corners >> (3 * slot) & 7
        if bits >> corner & 1 == 1:
            inside |= corner << (3 * n_inside)
            n_inside += 1
            mirrored ^= (slot - n_inside + 1) & 1    # it overtakes those before it that are outside
        else:
            outside |= corner << (3 * (slot - n_inside))
    return inside | outside << (3 * n_inside), n_inside, mirrored


@ti.kernel
def place_lattice_samples(n: ti.i32, first: ti.i32, n_side: ti.i32, low: ti.f32, size: ti.f32, sample: f32buf,
                          counter: i32buf):
    """n lattice points from `first` on as samples: all of the lattice is the cube [low, low + size]^3.

    sample   [n, 5]  out   position (not contracted yet), 0, 0
    counter  [4]     out   [0] = n
    thread   one per point
    """
    for t in range(n):
        at = lattice_point(first + t, n_side)
        for c in ti.static(range(3)):
            sample[5 * t + c] = low + size * at[c] / (n_side - 1)
        sample[5 * t + 3] = 0.0
        sample[5 * t + 4] = 0.0
        if t == 0:
            counter[0] = n


@ti.kernel
def lattice_opacity(n: ti.i32, first: ti.i32, n_side: ti.i32, length: ti.f32, grid_size: ti.i32, sample: f32buf,
                    sigma: f32buf, occupancy: u32buf, opacity: f32buf):
    """opacity = 1 - exp(-sigma length); 0 on the walls of the lattice and in empty cells, where rays do not look.

    sample     [n, 5]          in    position, in the cube
    sigma      [n]             in
    occupancy  see above       in    as rays use it
    opacity    [n_side^3]      out   n entries from `first` on
    thread     one per point
    """
    for t in range(n):
        at = lattice_point(first + t, n_side)
        wall = at.min() == 0 or at.max() == n_side - 1
        cell, _ = locate(t, sample, grid_size)
        number = cell_number(cell[0], cell[1], cell[2], grid_size)
        empty = (occupancy[number >> 5] >> ti.u32(number & 31)) & ti.u32(1) == ti.u32(0)
        opacity[first + t] = ti.select(wall or empty, 0.0, 1.0 - ti.exp(-sigma[t] * length))


@ti.kernel
def count_mesh(n_side: ti.i32, opacity: f32buf, vertex_span: i32buf, triangle_span: i32buf):
    """How many vertices the edges of each lattice point carry, and how many triangles lie in the cube above it: in each
    tetrahedron none, one where a corner is alone on its side, two where there are two on each.

    opacity        [n_side^3]     in
    vertex_span    [n_side^3, 2]  out   [1]
    triangle_span  [n_side^3, 2]  out   [1]
    thread         one per lattice point
    """
    for p in range(n_side * n_side * n_side):
        bits = corners_inside(p, n_side, opacity)
        n_triangles = 0
        if 0 < bits < 255:
            for number in range(6):
                _, n_inside, _ = tetrahedron(number, bits)
                n_triangles += ti.min(n_inside, 4 - n_inside)
        vertex_span[2 * p + 1] = count_bits(edges_crossed(bits))
        triangle_span[2 * p + 1] = n_triangles


@ti.kernel
def write_vertices(n_side: ti.i32, low: ti.f32, size: ti.f32, opacity: f32buf, vertex_span: i32buf, vertex: f32buf):
    """Vertices where opacity, linear along an edge, is 1/2 (not quite at its ends, so that no two vertices meet), each
    as a ray that looks into the surface, along the gradient of opacity at the end that is inside.

    opacity      [n_side^3]       in
    vertex_span  [n_side^3, 2]    in    first vertex, number of vertices
    vertex       [n_vertices, 8]  out   position (not contracted), 0, direction (unit length), 0
    thread       one per lattice point, which writes the vertices on its edges
    """
    for p in range(n_side * n_side * n_side):
        at = lattice_point(p, n_side)
        bits = corners_inside(p, n_side, opacity)
        i = vertex_span[2 * p]
        for d in range(1, 8):
            if edges_crossed(bits) >> d & 1 == 1:
                q = p + corner_offset(d, n_side)
                share = ti.math.clamp((0.5 - opacity[p]) / (opacity[q] - opacity[p]), 0.01, 0.99)
                inner = ti.select(bits & 1 == 1, p, q)
                direction = vec3(0.0)
                for c in ti.static(range(3)):
                    along, next_point = d >> c & 1, corner_offset(1 << c, n_side)
                    vertex[8 * i + c] = low + size * (at[c] + share * along) / (n_side - 1)
                    # The edge, a little, for points whose neighbours are all alike
                    direction[c] = (opacity[inner + next_point] - opacity[inner - next_point]
                                    + 1e-3 * along * (opacity[q] - opacity[p]))
                length = direction.norm()
                for c in ti.static(range(3)):
                    vertex[8 * i + 4 + c] = direction[c] / length
                vertex[8 * i + 3] = 0.0
                vertex[8 * i + 7] = 0.0
                i += 1


@ti.func
def edge_vertex(p, order, i, j, n_side, opacity: ti.template(), vertex_span: ti.template()):
    """The vertex between the i-th and the j-th corner, in a tetrahedron's order, of the cube above lattice point p.
    opacity and vertex_span are those of write_triangles."""
    corner, other = order >> (3 * i) & 7, order >> (3 * j) & 7
    q = p + corner_offset(corner & other, n_side)    # the lower end: a tetrahedron's corners lie above each other
    before = (1 << (corner ^ other)) - 1
    return vertex_span[2 * q] + count_bits(edges_crossed(corners_inside(q, n_side, opacity)) & before)


@ti.kernel
def write_triangles(n_side: ti.i32, opacity: f32buf, vertex_span: i32buf, triangle_span: i32buf, triangle: i32buf):
    """The triangles of each tetrahedron, counterclockwise as seen from outside. With its corners in order, those inside
    first, they join the edges

        01 02 03   if one corner is inside        02 03 13 and 02 13 12   if two are        03 13 23   if three are

    opacity        [n_side^3]        in
    vertex_span    [n_side^3, 2]     in    first vertex, number of vertices
    triangle_span  [n_side^3, 2]     in    first triangle, number of triangles
    triangle       [n_triangles, 3]  out   indices of vertices
    thread         one per lattice point, for the cube above it
    """
    for p in range(n_side * n_side * n_side):
        bits = corners_inside(p, n_side, opacity)
        at = triangle_span[2 * p]
        if triangle_span[2 * p + 1] > 0:
            for number in range(6):
                order, n_inside, mirrored = tetrahedron(number, bits)
                for k in range(ti.min(n_inside, 4 - n_inside)):
                    edges = 0o010203                 # two octal digits an edge
                    if n_inside == 2:
                        edges = ti.select(k == 0, 0o020313, 0o021312)
                    elif n_inside == 3:
                        edges = 0o031323
                    for c in ti.static(range(3)):
                        edge = edges >> (12 - 6 * c)
                        slot = ti.select(mirrored == 1, 2 - c, c)
                        triangle[3 * at + slot] = edge_vertex(p, order, edge >> 3 & 7, edge & 7, n_side, opacity,
                                                              vertex_span)
                    at += 1


@ti.kernel
def load_vertices(n: ti.i32, first: ti.i32, vertex: f32buf, sample: f32buf, ray: f32buf, sample_ray: i32buf,
                  ray_code: i32buf, counter: i32buf):
    """n vertices from `first` on as samples with a ray each, to ask the field for their colors.

    vertex      [n_vertices, 8]  in
    sample      [n, 5]           out   position (not contracted yet), 0, 0
    ray         [n, 8]           out
    sample_ray  [n]              out   t
    ray_code    [n]              out   0
    counter     [4]              out   [0] = n
    thread      one per vertex
    """
    for t in range(n):
        for c in ti.static(range(8)):
            ray[8 * t + c] = vertex[8 * (first + t) + c]
        for c in ti.static(range(3)):
            sample[5 * t + c] = vertex[8 * (first + t) + c]
        sample[5 * t + 3] = 0.0
        sample[5 * t + 4] = 0.0
        sample_ray[t] = t
        ray_code[t] = 0
        if t == 0:
            counter[0] = n


# =====================================================================================================================
# Part II: the family. What stands above is a complete trainer. What follows is other people's ideas, each as one more
# stage or pair of stages that takes the place of one above, in the same buffers and under the same rules; tinynerf.py's
# table MODELS says which model is made of which.
# =====================================================================================================================

STREAM_COARSE, STREAM_FINE = 10, 11      # random numbers of the samples along a ray
STREAM_MOMENT, STREAM_POINT, STREAM_ELASTIC = 12, 13, 14
FREQUENCIES = 10                         # L of a position's encoding: 6 L numbers, 3 of the position and a 1 are 64
DIRECTION_FREQUENCIES = 4                # L of a direction's: 6 L + 3 numbers
BETA_MIN = 0.15                          # least uncertainty of a pixel of NeRF in the Wild
THIN = 5.0                               # its transient part begins at a density of e^-5 per side of the box
WARP_FREQUENCIES = 4                     # L of a position where the warp of Nerfies is told it
ELASTIC_SCALE = 0.03                     # by which a warp may stretch, about, before the elastic loss gives up
AMBIENT_FREQUENCIES = 1                  # L of HyperNeRF's ambient coordinates


# ---- Sampling rays from end to end (NeRF, sections 4 and 5.2): no grid says where something may be. The coarse samples
# are spread evenly, the fine ones are drawn where the coarse ones found something. Each sample stands for the part of
# its ray from where it begins to where the next one does; the last one's ends where the ray does (NeRF's never ends). A
# sample lies at `middle` of its part: 0 is its begin (NeRF), 1/2 its middle (mip-NeRF). No gradient goes to places.

@ti.kernel
def count_even(n_rays: ti.i32, n: ti.i32, ray: f32buf, ray_span: i32buf):
    """How many samples each ray wants: n, or none if it misses the box. They are scanned as those of a march are.

    ray       [n_rays, 8]  in    [3] = t_first, [7] = t_last
    ray_span  [n_rays, 2]  out   [1] = number of samples
    thread    one per ray
    """
    for r in range(n_rays):
        ray_span[2 * r + 1] = ti.select(ray[8 * r + 3] < ray[8 * r + 7], n, 0)


@ti.func
def bend(t, bent):
    """How far along its ray a distance is, on the scale on which samples are even: t; where `bent`, -1 / (t + RADIUS),
    disparity as seen from a little behind the camera, of which all that is far away takes little (see place_on_ray)."""
    return ti.select(bent == 1, -1.0 / (t + RADIUS), t)


@ti.func
def unbend(s, bent):
    """The inverse of bend."""
    return ti.select(bent == 1, -1.0 / ti.min(s, -1e-9) - RADIUS, s)


@ti.func
def place_samples(r, middle, ray: ti.template(), ray_span: ti.template(), sample: ti.template(),
                  sample_ray: ti.template()):
    """The samples of a ray from where their parts begin, which is in `sample` as t, in order: dt is the length of the
    part, t and the position are at `middle` of it. ray, ray_span, sample and sample_ray are those of sample_even."""
    end = ray_span[2 * r] + ray_span[2 * r + 1]
    for i in range(ray_span[2 * r], end):
        t = sample[5 * i + 3]
        t_next = ray[8 * r + 7]
        if i + 1 < end:
            t_next = sample[5 * i + 8]
        sample[5 * i + 4] = ti.max(t_next - t, 0.0)  # they are in order but for rounding
        sample[5 * i + 3] = t + middle * sample[5 * i + 4]
        for c in ti.static(range(3)):
            sample[5 * i + c] = ray[8 * r + c] + sample[5 * i + 3] * ray[8 * r + 4 + c]
        sample_ray[i] = r


@ti.kernel
def sample_even(n_rays: ti.i32, n: ti.i32, bent: ti.i32, middle: ti.f32, jitter: ti.i32, seed: ti.i32, step: ti.i32,
                ray: f32buf, ray_span: i32buf, ray_step: i32buf, sample: f32buf, sample_ray: i32buf):
    """Coarse samples, stratified (NeRF, equation 2): a part begins at random in each of n equal intervals of a ray, at

        t_k = t_first + (k + u_k) (t_last - t_first) / n      u_k random in [0, 1) while training, 0 otherwise

    where `bent`, of intervals that are equal on the scale of bend() (Mip-NeRF 360, equation 11). place_samples makes
    samples of the parts; what a random u_0 leaves out before the first counts as empty.
    ray         [n_rays, 8]     in    from t_first, not jittered, to t_last
    ray_span    [n_rays, 2]     in    from claim_spans
    ray_step    [n_rays]        out   END: all of the ray is sampled; 0 if it was dropped
    sample      [n_samples, 5]  out   position, t, dt
    sample_ray  [n_samples]     out   r
    thread      one per ray
    """
    for r in range(n_rays):
        for j in range(ray_span[2 * r + 1]):
            u = ti.select(jitter == 1, random_f32(seed, STREAM_COARSE, step, r * n + j), 0.0)
            s_first, s_last = bend(ray[8 * r + 3], bent), bend(ray[8 * r + 7], bent)
            sample[5 * (ray_span[2 * r] + j) + 3] = unbend(s_first + (j + u) / n * (s_last - s_first), bent)
        place_samples(r, middle, ray, ray_span, sample, sample_ray)
        ray_step[r] = ti.select(ray_span[2 * r] >= 0, END, 0)


@ti.kernel
def weigh_samples(n_rays: ti.i32, floor: ti.f32, coarse_span: i32buf, coarse_sample: f32buf, rgb_sigma: f32buf,
                  weight: f32buf):
    """weight[i] = T_k alpha_k + floor, the share of the ray's light that comes from sample i: see composite_forward,
    but to the end of the ray, without T_STOP.

    coarse_span    [n_rays, 2]    in
    coarse_sample  [n_coarse, 5]  in    [4] = dt
    rgb_sigma      [n_coarse, 4]  in    [3] = sigma
    weight         [n_coarse]     out
    thread         one per ray
    """
    for r in range(n_rays):
        T = 1.0
        for i in range(coarse_span[2 * r], coarse_span[2 * r] + coarse_span[2 * r + 1]):
            alpha = 1.0 - ti.exp(-rgb_sigma[4 * i + 3] * coarse_sample[5 * i + 4])
            weight[i] = T * alpha + floor
            T *= 1.0 - alpha


@ti.kernel
def sample_where_light_is(n_rays: ti.i32, n: ti.i32, merge: ti.i32, bent: ti.i32, middle: ti.f32, jitter: ti.i32,
                          seed: ti.i32, step: ti.i32, ray: f32buf, coarse_span: i32buf, coarse_sample: f32buf,
                          weight: f32buf, ray_span: i32buf, ray_step: i32buf, sample: f32buf, sample_ray: i32buf):
    """Fine samples, by inverse transform sampling (NeRF, section 5.2): the weights, each spread evenly over its coarse
    sample's part (where `bent`, on the scale of bend()), are a density along the ray, and n samples are drawn from it,

        t_j = CDF^-1((j + u_j) / n)      CDF(t) = sum of weights before t / sum of all      u_j as in sample_even

    The numbers that the CDF is inverted at ascend, so one walk along the ray finds all t_j in order. Where `merge`, the
    coarse samples stay, and the walk merges the two sorted lists.
    ray            [n_rays, 8]     in
    coarse_span    [n_rays, 2]     in
    coarse_sample  [n_coarse, 5]   in
    weight         [n_coarse]      in    > 0
    ray_span       [n_rays, 2]     in    from claim_spans: n samples a ray, and where `merge` the coarse ones
    ray_step       [n_rays]        out   as in sample_even
    sample         [n_samples, 5]  out
    sample_ray     [n_samples]     out
    thread         one per ray
    """
    for r in range(n_rays):
        first = coarse_span[2 * r]
        end = first + coarse_span[2 * r + 1]
        total = 0.0
        for part in range(first, end):
            total += weight[part]
        i, part, before, kept = ray_span[2 * r], first, 0.0, first
        for j in range(ti.select(ray_span[2 * r + 1] > 0, n, 0)):
            u = ti.select(jitter == 1, random_f32(seed, STREAM_FINE, step, r * n + j), 0.0)
            target = (j + u) / n * total
            while part < end - 1 and before + weight[part] <= target:
                before += weight[part]
                part += 1
            dt = coarse_sample[5 * part + 4]
            share = ti.math.clamp((target - before) / weight[part], 0.0, 1.0)
            begin = coarse_sample[5 * part + 3] - middle * dt
            s_begin = bend(begin, bent)
            t = unbend(s_begin + share * (bend(begin + dt, bent) - s_begin), bent)
            while merge == 1 and kept < end and coarse_sample[5 * kept + 3] <= t:
                sample[5 * i + 3] = coarse_sample[5 * kept + 3]
                kept += 1
                i += 1
            sample[5 * i + 3] = t
            i += 1
        while merge == 1 and kept < end and i < ray_span[2 * r] + ray_span[2 * r + 1]:
            sample[5 * i + 3] = coarse_sample[5 * kept + 3]
            kept += 1
            i += 1
        place_samples(r, middle, ray, ray_span, sample, sample_ray)
        ray_step[r] = ti.select(ray_span[2 * r] >= 0, END, 0)


# ---- Frequency encoding (NeRF, section 5.1; it has no parameters, and no model needs its gradient in the position)

@ti.func
def wave(turns):
    """(sin, cos) of 2 pi turns. Whole turns are taken off first: f32 does that exactly, and a GPU's sin wants it."""
    angle = 6.2831853 * (turns - ti.round(turns))
    return ti.sin(angle), ti.cos(angle)


@ti.kernel
def frequency_encode_forward(counter: i32buf, sample: f32buf, feature: rows64):
    """gamma(p), equation 4, of the position p in [-1, 1]^3, followed by p itself and a 1, the input of a bias:

        feature[i] = (sin(2^l pi p_c), cos(2^l pi p_c) for l < L, c < 3;   p;   1)       p = 2 x - 1,  L = FREQUENCIES

    counter  [4]                     in
    sample   [n_samples, 5]          in    position x, in the cube
    feature  [n_samples] rows of 64  out
    thread   one per sample
    """
    for i in range(counter[0]):
        for c in range(3):
            p = 2.0 * sample[5 * i + c] - 1.0
            turns = 0.5 * p
            for l in range(FREQUENCIES):
                feature[i][6 * l + 2 * c], feature[i][6 * l + 2 * c + 1] = wave(turns)
                turns *= 2.0
            feature[i][6 * FREQUENCIES + c] = p
        feature[i][6 * FREQUENCIES + 3] = 1.0


@ti.kernel
def direction_input_forward(counter: i32buf, geometry: rows16, sample_ray: i32buf, ray: f32buf, color_input: rows64):
    """color_input[i] = (geometry[i], gamma(direction), 1): color_input_forward with frequencies instead of spherical
    harmonics. gamma(d) = (sin(2^l pi d_c), cos(2^l pi d_c) for l < L, c < 3;  d),   L = DIRECTION_FREQUENCIES

    counter      [4]                     in
    geometry     [n_samples] rows of 16  in
    sample_ray   [n_samples]             in
    ray          [n_rays, 8]             in    [4:7] = direction d
    color_input  [n_samples] rows of 64  out   the first 16 + 6 L + 4 entries
    thread       one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(OUTPUT)):
            color_input[i][c] = geometry[i][c]
        for c in range(3):
            d = ray[8 * sample_ray[i] + 4 + c]
            turns = 0.5 * d
            for l in range(DIRECTION_FREQUENCIES):
                at = OUTPUT + 6 * l + 2 * c
                color_input[i][at], color_input[i][at + 1] = wave(turns)
                turns *= 2.0
            color_input[i][OUTPUT + 6 * DIRECTION_FREQUENCIES + c] = d
        color_input[i][OUTPUT + 6 * DIRECTION_FREQUENCIES + 3] = 1.0


# ---- Deep network (NeRF, figure 7): layers y = relu(x W_x + h W_h) of the encoding x, the layer h before, or both (the
# skip). They are n blocks of 64 neurons wide: 1 suits a CPU, 4 are the 256 that are published. Block b of sample i
# is row b capacity + i. The last layer is one block and feeds the MLPs above. In `params` and in
#     weight    [n_out (n_x + 64 n_h)] rows of 64    for each block of outputs the rows of its W_x, then of its W_h; in
#     weight_t  [n_h n_out 64] rows of 64            W_h^T: for each block of h and block of outputs its 64 rows
# a layer's rows begin at `first` and first_t; its numbers in `params`, at first_param. grad_y and grad_h mean "before
# the ReLU", as grad_hidden does above.

@ti.kernel
def load_layer(n_x: ti.i32, n_h: ti.i32, n_out: ti.i32, first_param: ti.i32, first: ti.i32, first_t: ti.i32,
               params: rowsF, weight: rows64, weight_t: rows64):
    """Weights of a layer, the numbers of `params` from first_param on, as rows.

    params            [n_param_rows] rows of F  in
    weight, weight_t  see above                 out   rows from `first` and from first_t on
    thread            one per weight
    """
    n_in = n_x + WIDTH * n_h
    for t in range(n_out * n_in * WIDTH):
        w = params[(first_param + t) // N_FEATURES][(first_param + t) % N_FEATURES]
        row, column = t // WIDTH, t % WIDTH
        weight[first + row][column] = w
        b, j = row // n_in, row % n_in - n_x
        if j >= 0:
            weight_t[first_t + (j // WIDTH * n_out + b) * WIDTH + column][j % WIDTH] = w


@ti.kernel
def layer_forward(n_x: ti.i32, n_h: ti.i32, n_out: ti.i32, first: ti.i32, capacity: ti.i32, counter: i32buf, x: rows64,
                  h: rows64, weight: rows64, y: rows64):
    """y = relu(x W_x + h W_h), of the first n_x numbers of x and n_h blocks of h

    counter  [4]                             in
    x        [n_samples] rows of 64          in
    h        [n_h, capacity] rows of 64      in
    weight                                   in
    y        [n_out, capacity] rows of 64    out
    thread   one per (block of outputs, sample)
    """
    for t in range(n_out * counter[0]):
        b, i = t // counter[0], t % counter[0]
        row = first + b * (n_x + WIDTH * n_h)
        total = row_times_matrix(x, i, n_x, weight, row, row64(0.0))
        for c in range(n_h):
            total = row_times_matrix(h, c * capacity + i, WIDTH, weight, row + n_x + WIDTH * c, total)
        y[b * capacity + i] = ti.max(total, 0.0)


@ti.kernel
def layer_backward_input(n_h: ti.i32, n_out: ti.i32, first_t: ti.i32, capacity: ti.i32, counter: i32buf, h: rows64,
                         weight_t: rows64, grad_y: rows64, grad_h: rows64):
    """grad_h = grad_y W_h^T, and 0 where the ReLU put out 0. The encoding x needs no gradient.

    counter   [4]                             in
    h         [n_h, capacity] rows of 64      in
    weight_t                                  in
    grad_y    [n_out, capacity] rows of 64    in
    grad_h    [n_h, capacity] rows of 64      out
    thread    one per (block of h, sample)
    """
    for t in range(n_h * counter[0]):
        c, i = t // counter[0], t % counter[0]
        g = row64(0.0)
        for b in range(n_out):
            g = row_times_matrix(grad_y, b * capacity + i, WIDTH, weight_t, first_t + (c * n_out + b) * WIDTH, g)
        grad_h[c * capacity + i] = ti.select(h[c * capacity + i] > 0.0, g, row64(0.0))


@ti.kernel
def relu_backward(counter: i32buf, y: rows64, grad_y: rows64):
    """The gradient after the last layer's ReLU, from the MLP that it feeds, becomes that before it: 0 where y is 0.

    counter  [4]                     in
    y        [n_samples] rows of 64  in
    grad_y   [n_samples] rows of 64  in-out
    thread   one per sample
    """
    for i in range(counter[0]):
        grad_y[i] = ti.select(y[i] > 0.0, grad_y[i], row64(0.0))


@ti.kernel
def layer_backward_weight(n_x: ti.i32, n_h: ti.i32, n_out: ti.i32, capacity: ti.i32, chunk: ti.i32, pitch: ti.i32,
                          first: ti.i32, counter: i32buf, x: rows64, h: rows64, grad_y: rows64, partial: rowsF):
    """grad_W_x[j] = sum_i x_i[j] grad_y_i, grad_W_h[j] = sum_i h_i[j] grad_y_i, summed over chunks of samples as in
    mlp_backward_weight; sum_partials adds the chunks.

    counter  [4]                             in
    x        [n_samples] rows of 64          in
    h        [n_h, capacity] rows of 64      in
    grad_y   [n_out, capacity] rows of 64    in
    partial  [n_chunks, pitch] rows of F     out   this layer's rows of each chunk, from `first` on
    thread   one per (chunk, row of the layer in `params`)
    """
    n_in = n_x + WIDTH * n_h
    for t in range((counter[0] + chunk - 1) // chunk * n_out * n_in):
        row = t % (n_out * n_in)
        begin = t // (n_out * n_in) * chunk
        end = ti.min(begin + chunk, counter[0])
        first_y, j = row // n_in * capacity, row % n_in
        total = row64(0.0)
        if j < n_x:
            total = column_times_matrix(x, 0, j, grad_y, first_y, begin, end)
        else:
            first_h = (j - n_x) // WIDTH * capacity
            total = column_times_matrix(h, first_h, (j - n_x) % WIDTH, grad_y, first_y, begin, end)
        at = t // (n_out * n_in) * pitch + first + row * (WIDTH // N_FEATURES)
        for c in ti.static(range(WIDTH)):
            partial[at + c // N_FEATURES][c % N_FEATURES] = total[c]


# ---- Density of the models that sample. NeRF's own is relu(geometry[0]), which has no slope where there is no density:
# on a colored sphere before a background, the network of the tests put out 0 everywhere after a few steps, for good.
# mip-NeRF's is softplus(geometry[0] - 1), and all three models have that here.

@ti.func
def softplus(x):
    """log(1 + exp(x)); by its series where the 1 would round exp(x) away: far below, there would be no slope."""
    e = ti.exp(-ti.abs(x))
    series = e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - 0.25 * e)))
    return ti.max(x, 0.0) + ti.select(e < 0.01, series, ti.log(1.0 + e))


@ti.func
def alpha_of(x):
    """1 - exp(-x), alpha of an optical depth x, and softplus' slope where its value is x; by its series where that
    would cancel."""
    return ti.select(x < 0.01, x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x / 24.0))), 1.0 - ti.exp(-x))


@ti.kernel
def density_softplus_forward(counter: i32buf, geometry: rows16, rgb_sigma: f32buf):
    """sigma[i] = softplus(geometry[i][0] - 1) = log(1 + exp(geometry[i][0] - 1))

    counter    [4]                     in
    geometry   [n_samples] rows of 16  in    output of the density MLP
    rgb_sigma  [n_samples, 4]          out   [3]
    thread     one per sample
    """
    for i in range(counter[0]):
        rgb_sigma[4 * i + 3] = softplus(geometry[i][0] - 1.0)


@ti.kernel
def density_softplus_backward(counter: i32buf, rgb_sigma: f32buf, grad_rgb_sigma: f32buf, grad_color_input: rows64,
                              grad_geometry: rows16):
    """grad_geometry[i] = grad_color_input[i][:16] + (softplus' grad_sigma, 0, ..., 0)

    counter           [4]                     in
    rgb_sigma         [n_samples, 4]          in    [3] = sigma
    grad_rgb_sigma    [n_samples, 4]          in    [3]
    grad_color_input  [n_samples] rows of 64  in    the first 16 entries
    grad_geometry     [n_samples] rows of 16  out
    thread            one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(OUTPUT)):
            grad_geometry[i][c] = grad_color_input[i][c]
        slope = alpha_of(rgb_sigma[4 * i + 3])
        grad_geometry[i][0] = grad_color_input[i][0] + slope * grad_rgb_sigma[4 * i + 3]


# ---- Cones instead of rays (Barron et al. 2021, "Mip-NeRF"): a pixel sees a cone, and a part of it, a conical frustum,
# is encoded as the Gaussian that is nearest to it. What is smaller than the frustum fades from the encoding, and one
# network serves both levels. So that black and white are within reach, colors have a margin (color_head_forward).

@ti.kernel
def widen_weights(n_rays: ti.i32, floor: ti.f32, coarse_span: i32buf, weight: f32buf, wide_weight: f32buf):
    """Weights for the fine samples: a maximum over two neighbours, then a mean over two of these,

        wide_k = (max(w_{k-1}, w_k) + max(w_k, w_{k+1})) / 2 + floor          w_{-1} = w_0, w_n = w_{n-1}

    so that what is next to something that a coarse sample hit is looked at too, and a little everywhere.
    coarse_span  [n_rays, 2]  in
    weight       [n_coarse]   in    from weigh_samples
    wide_weight  [n_coarse]   out
    thread       one per ray
    """
    for r in range(n_rays):
        first = coarse_span[2 * r]
        last = first + coarse_span[2 * r + 1] - 1
        for i in range(first, last + 1):
            before, after = weight[ti.max(i - 1, first)], weight[ti.min(i + 1, last)]
            wide_weight[i] = 0.5 * (ti.max(before, weight[i]) + ti.max(weight[i], after)) + floor


@ti.kernel
def integrated_encode_forward(unbounded: ti.i32, counter: i32buf, sample_ray: i32buf, ray: f32buf, ray_view: i32buf,
                              size: i32buf, camera: f32buf, sample: f32buf, feature: rows64):
    """The mean of frequency_encode_forward's waves over a Gaussian (section 3.1). The frustum from t - h to t + h, with
    h = dt / 2, of a cone of radius q at distance 1 has the mean t + 2 t h^2 / (3 t^2 + h^2) on the ray, and the
    covariance (v_t - v_r) d d^T + v_r I,

        along    v_t = h^2 / 3 - 4/15 h^4 (12 t^2 - h^2) / (3 t^2 + h^2)^2
        across   v_r = q^2 (t^2 / 4 + 5/12 h^2 - 4/15 h^4 / (3 t^2 + h^2))

    Where `unbounded`, `contract` is taken as linear about that mean x (Mip-NeRF 360, equation 9), with the Jacobian J:
    with e the unit vector from the middle of the cube to x, and contract's |y|,

        J    = a (I - e e^T) + b e e^T      a = (2 |y| - 1) / |y|^2, b = 1 / |y|^2 where |y| > 1; elsewhere a = b = 1
        v_c  = (v_t - v_r) (J d)_c^2 + v_r (a^2 + (b^2 - a^2) e_c^2)        the diagonal of J covariance J^T

    p = 2 mean - 1, the mean contracted where x is, has variances 4 v_c, since lengths double;

        feature[i] = (sin(2^l pi p_c) fade, cos(2^l pi p_c) fade, fade = exp(-(2^l pi)^2 4 v_c / 2);   0, 0, 0;   1)

    q = 2 / sqrt(12) of a pixel's width: a disc with the pixel's variance. At distance 1 a fisheye's pixel is 1 / f
    wide, another lens's cos / f, where cos is that of the angle between the ray and the optical axis; the lens's
    distortion is not in it.
    unbounded   1: contract; 0: a scene in the box
    counter     [4]                     in
    sample_ray  [n_samples]             in
    ray         [n_rays, 8]             in    [4:7] = direction d
    ray_view    [n_rays]                in
    size        [n_views, 4]            in    [3] = 1: a fisheye
    camera      [n_views, 22]           in    see generate_rays
    sample      [n_samples, 5]          in    position, not contracted; t in the middle of the part; dt
    feature     [n_samples] rows of 64  out
    thread      one per sample
    """
    for i in range(counter[0]):
        r = sample_ray[i]
        m = CAMERA * ray_view[r]
        t, h = sample[5 * i + 3], 0.5 * sample[5 * i + 4]
        scale = ti.max(3.0 * t * t + h * h, 1e-15)               # 0 for no part at all, at the camera
        x, d, cos = vec3(0.0), vec3(0.0), 0.0
        for c in ti.static(range(3)):
            d[c] = ray[8 * r + 4 + c]
            x[c] = sample[5 * i + c] + 2.0 * t * h * h / scale * d[c]
            cos -= d[c] * camera[m + 4 * c + 2]
        share = ti.select(size[4 * ray_view[r] + 3] == 1, 1.0, ti.max(cos, 0.0))
        q = 0.57735027 * share * 2.0 / (camera[m + 12] + camera[m + 13])
        v_t = h * h / 3.0 - 4.0 / 15.0 * h * h * h * h * (12.0 * t * t - h * h) / (scale * scale)
        v_r = q * q * (t * t / 4.0 + 5.0 / 12.0 * h * h - 4.0 / 15.0 * h * h * h * h / scale)
        n = (x - 0.5).norm() / RADIUS
        e = (x - 0.5) / (RADIUS * ti.max(n, 1e-9))
        a, b = 1.0, 1.0
        if unbounded == 1 and n > 1.0:
            x = contract(x)
            a, b = (2.0 - 1.0 / n) / n, 1.0 / (n * n)
        d_e = d.dot(e)
        for c in ti.static(range(3)):
            jd = a * d[c] + (b - a) * d_e * e[c]
            v_c = (v_t - v_r) * jd * jd + v_r * (a * a + (b * b - a * a) * e[c] * e[c])
            turns = x[c] - 0.5                                   # half of p
            exponent = 0.5 * 4.0 * v_c * 9.8696044               # of the first wave
            for l in range(FREQUENCIES):
                s_wave, c_wave = wave(turns)
                fade = ti.exp(-exponent)
                feature[i][6 * l + 2 * c] = s_wave * fade
                feature[i][6 * l + 2 * c + 1] = c_wave * fade
                turns *= 2.0
                exponent *= 4.0
            feature[i][6 * FREQUENCIES + c] = 0.0
        feature[i][6 * FREQUENCIES + 3] = 1.0


# ---- Proposals (Barron et al. 2022, "Mip-NeRF 360"): in all of space, frustums go through the contraction and samples
# are even in a bent distance (see bend). A small network of densities alone proposes where on a ray its light comes
# from. It never sees an image; it only learns to leave nothing out that the large network finds.

@ti.func
def part_begin(i, sample: ti.template()):
    """Where the part of a ray begins that a sample stands for, which lies in its middle; sample [n_samples, 5]."""
    return sample[5 * i + 3] - 0.5 * sample[5 * i + 4]


@ti.kernel
def interlevel_loss(n_rays: ti.i32, counter: i32buf, coarse_span: i32buf, coarse_sample: f32buf, coarse_weight: f32buf,
                    ray_span: i32buf, sample: f32buf, weight: f32buf, grad_coarse_weight: f32buf):
    """Gradient of what the fine samples found and the proposal has not foreseen (equations 12 and 13); the fine weights
    count as given, and get none:

        bound_i = sum of the weights of all coarse parts of the ray that overlap with part i
        L       = 1/N sum_r sum_i max(0, w_i - bound_i)^2 / (w_i + 1e-7)                            N = counter[1]
        grad_coarse_weight_k = -2/N sum of max(0, w_i - bound_i) / (w_i + 1e-7) over all i whose part overlaps with k

    If the fine weights are a finer histogram of what the coarse ones say, no bound is exceeded.
    counter             [4]             in    of the coarse samples
    coarse_span         [n_rays, 2]     in
    coarse_sample       [n_coarse, 5]   in    [3] = t, [4] = dt
    coarse_weight       [n_coarse]      in    from weigh_samples
    ray_span            [n_rays, 2]     in
    sample              [n_samples, 5]  in    [3] = t, [4] = dt
    weight              [n_samples]     in    from weigh_samples
    grad_coarse_weight  [n_coarse]      out
    thread              one per ray, which owns its samples: both lists are in order, so one walk meets all pairs
    """
    for r in range(n_rays):
        part, end = coarse_span[2 * r], coarse_span[2 * r] + coarse_span[2 * r + 1]
        for k in range(part, end):
            grad_coarse_weight[k] = 0.0
        for i in range(ray_span[2 * r], ray_span[2 * r] + ray_span[2 * r + 1]):
            begin = part_begin(i, sample)
            while part + 1 < end and part_begin(part + 1, coarse_sample) <= begin:
                part += 1
            bound, behind = 0.0, part
            while behind < end and part_begin(behind, coarse_sample) < begin + sample[5 * i + 4]:
                bound += coarse_weight[behind]
                behind += 1
            slope = -2.0 / ti.max(counter[1], 1) * ti.max(weight[i] - bound, 0.0) / (weight[i] + 1e-7)
            for k in range(part, behind):
                grad_coarse_weight[k] = grad_coarse_weight[k] + slope


@ti.kernel
def weigh_samples_backward(n_rays: ti.i32, coarse_span: i32buf, coarse_sample: f32buf, rgb_sigma: f32buf,
                           grad_weight: f32buf, grad_rgb_sigma: f32buf):
    """Gradient of weigh_samples in the densities:

        grad_sigma_k = dt_k (T_{k+1} grad_weight_k - sum_{m>k} w_m grad_weight_m)        w_m = T_m alpha_m

    There are two walks: along the ray for T, which waits where the gradient will be, and back for the sum of what is
    behind, which no rounding of what is before it can spoil.
    coarse_span     [n_rays, 2]    in
    coarse_sample   [n_coarse, 5]  in    [4] = dt
    rgb_sigma       [n_coarse, 4]  in    [3] = sigma
    grad_weight     [n_coarse]     in
    grad_rgb_sigma  [n_coarse, 4]  out   0, 0, 0, grad_sigma; read, too
    thread          one per ray, which owns its samples
    """
    for r in range(n_rays):
        first, n = coarse_span[2 * r], coarse_span[2 * r + 1]
        T, behind = 1.0, 0.0
        for i in range(first, first + n):
            for c in ti.static(range(3)):
                grad_rgb_sigma[4 * i + c] = 0.0
            T *= ti.exp(-rgb_sigma[4 * i + 3] * coarse_sample[5 * i + 4])
            grad_rgb_sigma[4 * i + 3] = T
        for j in range(n):
            i = first + n - 1 - j
            T_after, T_before = grad_rgb_sigma[4 * i + 3], 1.0
            if j < n - 1:
                T_before = grad_rgb_sigma[4 * i - 1]
            grad_rgb_sigma[4 * i + 3] = coarse_sample[5 * i + 4] * (T_after * grad_weight[i] - behind)
            alpha = 1.0 - ti.exp(-rgb_sigma[4 * i + 3] * coarse_sample[5 * i + 4])
            behind += T_before * alpha * grad_weight[i]


# ---- Photographs by strangers (Martin-Brualla et al. 2021, "NeRF in the Wild", section 4.2), on the hash grid above:
# whoever walks through one photograph is in no other. A second color MLP, with a code of its own for each photograph,
# puts out what only that one shows: color, density, and how uncertain the pixel is, by which its error counts less.
# `transient` [n_samples, 5] holds rgb, density u and uncertainty b of each sample. New views leave all of it away. Its
# samples are those that are kept for the static part, which has some wherever a photograph shows more than background.

@ti.kernel
def transient_head_forward(counter: i32buf, transient_raw: rows16, transient: f32buf):
    """rgb = sigmoid(raw[:3]),  u = softplus(raw[3] - THIN),  b = softplus(raw[4]) = log(1 + exp(raw[4]))

    The paper has no THIN: with it there is next to nothing transient at first, and the static part gets to learn.
    counter        [4]                     in
    transient_raw  [n_samples] rows of 16  in    output of the transient MLP: the first 5 entries
    transient      [n_samples, 5]          out
    thread         one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(3)):
            transient[5 * i + c] = sigmoid(transient_raw[i][c])
        for c in ti.static(range(3, 5)):
            transient[5 * i + c] = softplus(transient_raw[i][c] - (THIN if c == 3 else 0.0))


@ti.kernel
def transient_head_backward(counter: i32buf, transient: f32buf, grad_transient: f32buf, grad_transient_raw: rows16):
    """The slope of the sigmoid is rgb (1 - rgb), that of softplus alpha_of(softplus).

    counter             [4]                     in
    transient           [n_samples, 5]          in
    grad_transient      [n_samples, 5]          in
    grad_transient_raw  [n_samples] rows of 16  out   the first 5 entries
    thread              one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(5)):
            x = transient[5 * i + c]
            slope = x * (1.0 - x) if c < 3 else alpha_of(x)
            grad_transient_raw[i][c] = slope * grad_transient[5 * i + c]


@ti.kernel
def transient_input_backward(counter: i32buf, grad_transient_input: rows64, grad_color_input: rows64):
    """The geometry goes into both color MLPs (color_input_forward, with either code): its gradients add.

    counter               [4]                     in
    grad_transient_input  [n_samples] rows of 64  in      the first 16 entries
    grad_color_input      [n_samples] rows of 64  in-out  the first 16 entries
    thread                one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(OUTPUT)):
            grad_color_input[i][c] = grad_color_input[i][c] + grad_transient_input[i][c]


@ti.kernel
def composite_both_forward(n_rays: ti.i32, ray_span: i32buf, sample: f32buf, rgb_sigma: f32buf, transient: f32buf,
                           pixel: f32buf):
    """Static and transient part before and behind each other (section 4.2): both dim, both shine,

        alpha_k = 1 - exp(-sigma_k dt_k),  alpha'_k = 1 - exp(-u_k dt_k),  T_{k+1} = T_k exp(-(sigma_k + u_k) dt_k)
        pixel   = sum_k T_k (alpha_k rgb_k + alpha'_k rgb'_k)        until T_k < T_STOP; pixel[3] = T_end

    ray_span   [n_rays, 2]     in
    sample     [n_samples, 5]  in    [4] = dt
    rgb_sigma  [n_samples, 4]  in
    transient  [n_samples, 5]  in    [0:4] = rgb', u
    pixel      [n_rays, 4]     out   in place of what composite_forward left there
    thread     one per ray
    """
    for r in range(n_rays):
        T = 1.0
        color = vec3(0.0)
        first = ray_span[2 * r]
        for i in range(first, first + ray_span[2 * r + 1]):
            if T < T_STOP:
                break
            through = ti.exp(-rgb_sigma[4 * i + 3] * sample[5 * i + 4])
            through_too = ti.exp(-transient[5 * i + 3] * sample[5 * i + 4])
            for c in ti.static(range(3)):
                color[c] += T * ((1.0 - through) * rgb_sigma[4 * i + c] + (1.0 - through_too) * transient[5 * i + c])
            T *= through * through_too
        for c in ti.static(range(3)):
            pixel[4 * r + c] = color[c]
        pixel[4 * r + 3] = T


@ti.kernel
def composite_both_backward(n_rays: ti.i32, ray_span: i32buf, sample: f32buf, rgb_sigma: f32buf, transient: f32buf,
                            pixel: f32buf, grad_pixel: f32buf, grad_rgb_sigma: f32buf, grad_transient: f32buf):
    """As composite_backward, with behind_k the light of both parts from samples after k:

        grad_rgb_k   = T_k alpha_k grad_pixel            grad_rgb'_k = T_k alpha'_k grad_pixel
        grad_sigma_k = dt_k ((T_k exp(-sigma_k dt_k) rgb_k - behind_k) . grad_pixel - T_end grad_T)
        grad_u_k    += dt_k ((T_k exp(-u_k dt_k) rgb'_k - behind_k) . grad_pixel - T_end grad_T)

    ray_span        [n_rays, 2]     in
    sample          [n_samples, 5]  in
    rgb_sigma       [n_samples, 4]  in
    transient       [n_samples, 5]  in
    pixel           [n_rays, 4]     in      from composite_both_forward
    grad_pixel      [n_rays, 4]     in
    grad_rgb_sigma  [n_samples, 4]  out     0 behind the early stop
    grad_transient  [n_samples, 5]  in-out  [0:3]: overwritten, 0 behind the early stop; [3]: added to
    thread          one per ray, which owns its samples
    """
    for r in range(n_rays):
        T = 1.0
        behind = vec3(pixel[4 * r], pixel[4 * r + 1], pixel[4 * r + 2])
        first = ray_span[2 * r]
        for i in range(first, first + ray_span[2 * r + 1]):
            for c in ti.static(range(4)):
                grad_rgb_sigma[4 * i + c] = 0.0
            for c in ti.static(range(3)):
                grad_transient[5 * i + c] = 0.0
            if T >= T_STOP:
                through = ti.exp(-rgb_sigma[4 * i + 3] * sample[5 * i + 4])
                through_too = ti.exp(-transient[5 * i + 3] * sample[5 * i + 4])
                gain = -pixel[4 * r + 3] * grad_pixel[4 * r + 3]
                gain_too = gain
                for c in ti.static(range(3)):
                    w, w_too = T * (1.0 - through), T * (1.0 - through_too)
                    # No rounding beyond what can be behind: of both parts, at most 2 T each.
                    behind[c] = ti.math.clamp(behind[c] - w * rgb_sigma[4 * i + c] - w_too * transient[5 * i + c],
                                              0.0, 2.0 * T * through * through_too)
                    grad_rgb_sigma[4 * i + c] = w * grad_pixel[4 * r + c]
                    grad_transient[5 * i + c] = w_too * grad_pixel[4 * r + c]
                    gain += (T * through * rgb_sigma[4 * i + c] - behind[c]) * grad_pixel[4 * r + c]
                    gain_too += (T * through_too * transient[5 * i + c] - behind[c]) * grad_pixel[4 * r + c]
                grad_rgb_sigma[4 * i + 3] = sample[5 * i + 4] * gain
                grad_transient[5 * i + 3] = grad_transient[5 * i + 3] + sample[5 * i + 4] * gain_too
                T *= through * through_too


@ti.kernel
def uncertainty_loss(n_rays: ti.i32, strength: ti.f32, counter: i32buf, ray_span: i32buf, sample: f32buf,
                     transient: f32buf, loss: f32buf, grad_pixel: f32buf, grad_transient: f32buf):
    """The squared error as the likelihood of a normal distribution whose deviation beta is rendered from the transient
    part alone; and a toll on that part's density, which keeps it for what the static one cannot say:

        beta = BETA_MIN + sum_k T'_k alpha'_k b_k        T'_{k+1} = T'_k exp(-u_k dt_k), to the end of the ray
        L    = 1/N sum_r |color - target|^2 / (2 beta^2) + log(beta^2) / 2 + strength (mean of the ray's u_k)

        grad_pixel *= 3 / (2 beta^2)                     the first term of L is loss_and_gradient's but for that
        grad_beta   = 1/N (1 / beta - |color - target|^2 / beta^3)               0 where the ray does not count
        grad_b_k    = T'_k alpha'_k grad_beta
        grad_u_k    = dt_k (T'_{k+1} b_k - sum_{m>k} T'_m alpha'_m b_m) grad_beta + strength / (N n_samples of the ray)

    The paper adds the minimum to each b_k; then pixels without a transient part would have none. Its minimum is 0.03:
    with that, a run of a minute gives up all pixels that are hard at first, the subject's, for those of empty air.
    counter         [4]             in      [1] = N, the rays that were not dropped
    ray_span        [n_rays, 2]     in
    sample          [n_samples, 5]  in      [4] = dt
    transient       [n_samples, 5]  in      [3] = u, [4] = b
    loss            [n_rays]        in      |color - target|^2 / 3; 0 where the ray does not count
    grad_pixel      [n_rays, 4]     in-out  from loss_and_gradient
    grad_transient  [n_samples, 5]  out     [3:5]; composite_both_backward does the rest
    thread          one per ray, which owns its samples
    """
    for r in range(n_rays):
        first, end = ray_span[2 * r], ray_span[2 * r] + ray_span[2 * r + 1]
        T, behind = 1.0, 0.0
        for i in range(first, end):
            w = T * alpha_of(transient[5 * i + 3] * sample[5 * i + 4])       # to all digits: b may be far above beta
            behind += w * transient[5 * i + 4]
            T -= w
        inverse = 1.0 / (BETA_MIN + behind)
        for c in ti.static(range(4)):
            grad_pixel[4 * r + c] = 1.5 * inverse * inverse * grad_pixel[4 * r + c]
        n = ti.max(counter[1], 1)
        grad_beta = 0.0
        if loss[r] > 0.0:
            grad_beta = (inverse - 3.0 * loss[r] * inverse * inverse * inverse) / n
        toll = strength / (n * ti.max(end - first, 1))
        T = 1.0
        for i in range(first, end):
            w = T * alpha_of(transient[5 * i + 3] * sample[5 * i + 4])
            T -= w
            behind -= w * transient[5 * i + 4]
            grad_transient[5 * i + 3] = sample[5 * i + 4] * (T * transient[5 * i + 4] - behind) * grad_beta + toll
            grad_transient[5 * i + 4] = w * grad_beta


# ---- Moving things (Park et al. 2021, "Nerfies"): each photograph is of a moment of its own, which has a code. A warp
# takes what a ray meets to where it is in a canonical scene that does not move, the field above: seen position x and
# code of the photograph -> MLP -> a screw motion (r, v), and `sample` gets the position after that motion. Positions
# turn around the cube's middle, and what a warp moves out of the cube stays on its border. `seen` [n_samples, 5] keeps
# the samples as they were marched: the occupancy grid is one of places where something is at any moment. Below, r is an
# axis, v a translation, c_n a coefficient, and "x" between two vectors their cross product.

@ti.func
def windows(alpha):
    """How far each wave is let in while training goes from coarse to fine (equation 8); alpha grows, from 0 on."""
    w = ti.Vector([0.0 for _ in range(WARP_FREQUENCIES)])
    for l in ti.static(range(WARP_FREQUENCIES)):
        w[l] = 0.5 - 0.5 * ti.cos(3.14159265 * ti.math.clamp(alpha - l, 0.0, 1.0))
    return w


@ti.kernel
def warp_input_forward(n_rays: ti.i32, n_code: ti.i32, first: ti.i32, window: f32buf, ray_span: i32buf, seen: f32buf,
                       ray_view: i32buf, params: rowsF, warp_input: rows64):
    """What the warp is told of sample i: waves of its position, p = 2 x - 1; the position; a 1; its photograph's code:

        (w_l sin(2^l pi p_c), w_l cos(2^l pi p_c) for l < L, c < 3;  p;  1;  0 ...)         L = WARP_FREQUENCIES

    in the first 32 entries (those of c at 6 l + 2 c), then CODE_SCALE code. w = windows(alpha).
    window      [1]                       in    alpha
    ray_span    [n_rays, 2]               in    first sample, number of samples; points are rays of one sample
    seen        [n_samples, 5]            in    position, t, dt
    ray_view    [n_rays]                  in
    params      [n_param_rows] rows of F  in    numbers from `first` on: code [n_views + 1, n_code]
    warp_input  [n_samples] rows of 64    out   the first 32 + n_code entries
    thread      one per ray, which owns its samples
    """
    for r in range(n_rays):
        w = windows(window[0])
        for i in range(ray_span[2 * r], ray_span[2 * r] + ray_span[2 * r + 1]):
            for c in ti.static(range(2 * OUTPUT)):
                warp_input[i][c] = 0.0
            for c in range(3):
                p = 2.0 * seen[5 * i + c] - 1.0
                turns = 0.5 * p
                for l in ti.static(range(WARP_FREQUENCIES)):
                    s_wave, c_wave = wave(turns)
                    warp_input[i][6 * l + 2 * c], warp_input[i][6 * l + 2 * c + 1] = w[l] * s_wave, w[l] * c_wave
                    turns *= 2.0
                warp_input[i][6 * WARP_FREQUENCIES + c] = p
            warp_input[i][6 * WARP_FREQUENCIES + 3] = 1.0
            for c in range(n_code):
                at = first + n_code * ray_view[r] + c
                warp_input[i][2 * OUTPUT + c] = CODE_SCALE * params[at // N_FEATURES][at % N_FEATURES]


@ti.kernel
def blend_codes(n_code: ti.i32, first: ti.i32, a: ti.i32, b: ti.i32, share: ti.f32, to: ti.i32, params: rowsF):
    """The code of a moment between two photographs, for pictures, which are drawn with the code behind the last
    photograph's: code[to] = (1 - share) code[a] + share code[b]

    params  [n_param_rows] rows of F  in-out  numbers from `first` on: code [n_views + 1, n_code]
    thread  one per number of the code
    """
    for c in range(n_code):
        at_a, at_b, at = first + n_code * a + c, first + n_code * b + c, first + n_code * to + c
        params[at // N_FEATURES][at % N_FEATURES] = (1.0 - share) * params[at_a // N_FEATURES][at_a % N_FEATURES] + (
            share * params[at_b // N_FEATURES][at_b % N_FEATURES])


@ti.func
def stumpff(s):
    """c_n = sum_k (-s)^k / (2 k + n)! for n = 1 ... 7 (entry n): with s = angle^2, c_1 = sin(angle) / angle,
    c_2 = (1 - cos(angle)) / angle^2, c_3 = (angle - sin(angle)) / angle^3, without their 0/0 and cancellation. Slopes:
    c_n' = (n c_{n+2} - c_{n+1}) / 2. Good to f32 up to a whole turn, s = (2 pi)^2; from s = 40 on they stay what they
    are there: next to no turn, finite, and so are the slopes, which are not those of that."""
    x = ti.min(s, 40.0)
    c = ti.Vector([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    for back in range(14):
        k = 2.0 * (13 - back)
        c[6] = 1.0 - x / ((k + 7.0) * (k + 8.0)) * c[6]
        c[7] = 1.0 - x / ((k + 8.0) * (k + 9.0)) * c[7]
    c[6] /= 720.0
    c[7] /= 5040.0
    c[5] = 1.0 / 120.0 - x * c[7]
    c[4] = 1.0 / 24.0 - x * c[6]
    c[3] = 1.0 / 6.0 - x * c[5]
    c[2] = 0.5 - x * c[4]
    c[1] = 1.0 - x * c[3]
    return c


@ti.func
def slopes(c):
    """c_n' of stumpff's c_n, for n = 1 ... 5; slopes of these: c_n'', for n = 1 ... 3."""
    slope = ti.Vector([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for n in ti.static(range(1, 6)):
        slope[n] = 0.5 * (n * c[n + 2] - c[n + 1])
    return slope


@ti.func
def screw_motion(raw: ti.template(), i, seen: ti.template()):
    """(r, v, x, c, y) of sample i: its screw axis (`raw` and `seen` are warp_forward's warp_raw and seen); its position
    x and where the motion takes it (section 3.2), from the cube's middle: y = exp(r) x + G v, by Rodrigues' formula

        y = x + c_1 r x x + c_2 r x (r x x)  +  v + c_2 r x v + c_3 r x (r x v)          c_n: stumpff of s = r . r
    """
    r, v = vec3(raw[i][0], raw[i][1], raw[i][2]), vec3(raw[i][3], raw[i][4], raw[i][5])
    x = vec3(seen[5 * i] - 0.5, seen[5 * i + 1] - 0.5, seen[5 * i + 2] - 0.5)
    c = stumpff(r.dot(r))
    p, u = r.cross(x), r.cross(v)
    return r, v, x, c, x + c[1] * p + c[2] * r.cross(p) + v + c[2] * u + c[3] * r.cross(u)


@ti.kernel
def warp_forward(counter: i32buf, warp_raw: rows16, sample: f32buf, seen: f32buf):
    """The position of sample i after the screw motion, on the cube's border if that is outside.

    counter   [4]                     in
    warp_raw  [n_samples] rows of 16  in      output of the warp's MLP: r, v
    sample    [n_samples, 5]          in-out  position
    seen      [n_samples, 5]          out     `sample` as it was
    thread    one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(5)):
            seen[5 * i + c] = sample[5 * i + c]
        r, v, x, coefficients, y = screw_motion(warp_raw, i, seen)
        for c in ti.static(range(3)):
            sample[5 * i + c] = ti.math.clamp(y[c] + 0.5, 0.0, 1.0)


@ti.func
def turn_backward(r, x, a, b, grad):
    """Gradients (of r, x, a, b) of y = a r x x + b r x (r x x). Where u = v x w, grad_v = w x grad_u and grad_w =
    grad_u x v."""
    p = r.cross(x)
    grad_q = b * grad
    grad_p = a * grad + grad_q.cross(r)
    return p.cross(grad_q) + x.cross(grad_p), grad_p.cross(r), grad.dot(p), grad.dot(r.cross(p))


@ti.kernel
def warp_backward(counter: i32buf, warp_raw: rows16, seen: f32buf, grad_position: f32buf, grad_warp_raw: rows16):
    """Gradient of the screw motion in r and v, term by term; 0 where the cube's border stopped it.

    counter        [4]                     in
    warp_raw       [n_samples] rows of 16  in
    seen           [n_samples, 5]          in
    grad_position  [n_samples, 3]          in    of the position after the motion
    grad_warp_raw  [n_samples] rows of 16  out   the first 6 entries
    thread         one per sample
    """
    for i in range(counter[0]):
        r, v, x, c, y = screw_motion(warp_raw, i, seen)
        g = vec3(0.0)
        for k in ti.static(range(3)):
            g[k] = ti.select(ti.abs(y[k]) <= 0.5, grad_position[3 * i + k], 0.0)
        slope = slopes(c)
        grad_r, grad_x, g_1, g_2 = turn_backward(r, x, c[1], c[2], g)
        grad_r_v, grad_v, g_2_v, g_3 = turn_backward(r, v, c[2], c[3], g)
        grad_r += grad_r_v + 2.0 * (slope[1] * g_1 + slope[2] * (g_2 + g_2_v) + slope[3] * g_3) * r
        grad_v += g
        for k in ti.static(range(3)):
            grad_warp_raw[i][k] = grad_r[k]
            grad_warp_raw[i][3 + k] = grad_v[k]


@ti.kernel
def hash_position_backward(n_levels: ti.i32, counter: i32buf, level: i32buf, sample: f32buf, table: rowsF,
                           grad_feature: rows64, grad_position: f32buf):
    """Gradient of hash_encode_forward in the position:

        grad_position_c = sum over levels l, corners v  d w_v / d x_c  table[slot_l(v)] . grad_feature[i][F l:F (l + 1)]
        d w_v / d x_c   = resolution (w_v with fraction_c = 1 - w_v with fraction_c = 0)         w_v is linear in each

    counter, level, sample, table          in    as in hash_encode_forward
    grad_feature   [n_samples] rows of 64  in
    grad_position  [n_samples, 3]          out
    thread         one per sample
    """
    for i in range(counter[0]):
        grad = vec3(0.0)
        for l in range(n_levels):
            cell, fraction = locate(i, sample, level[4 * l])
            slots, value = corner_slots(l, level, cell), vec8(0.0)
            for corner in ti.static(range(8)):
                for c in ti.static(range(N_FEATURES)):
                    value[corner] += table[ti.cast(slots[corner], ti.i32)][c] * grad_feature[i][N_FEATURES * l + c]
            for c in ti.static(range(3)):
                low, high = fraction, fraction
                low[c], high[c] = 0.0, 1.0
                grad[c] += level[4 * l] * value.dot(corner_weights(high) - corner_weights(low))
        for c in ti.static(range(3)):
            grad_position[3 * i + c] = grad[c]


# ---- What keeps a warp honest (Nerfies, sections 3.3 and 3.4): photographs of one moment each say little of how things
# moved. Static points, known from elsewhere, are to stay where they are, and things are to move as rigidly as they can.

@ti.kernel
def pick_moments(n: ti.i32, n_views: ti.i32, seed: ti.i32, step: ti.i32, view: i32buf):
    """A random photograph's moment for each of n points.

    view    [n]  out
    thread  one per point
    """
    for i in range(n):
        view[i] = ti.cast(random_u32(seed, STREAM_MOMENT, step, i) % ti.u32(n_views), ti.i32)


@ti.kernel
def pick_static_points(n: ti.i32, n_points: ti.i32, seed: ti.i32, step: ti.i32, point: f32buf, sample: f32buf):
    """n random ones of the static points, as samples.

    point   [n_points, 3]  in    in units of the cube, maybe outside of it, not contracted yet
    sample  [n, 5]         out   position, as in `point`, 0, 0
    thread  one per sample
    """
    for i in range(n):
        p = ti.cast(random_u32(seed, STREAM_POINT, step, i) % ti.u32(n_points), ti.i32)
        for c in ti.static(range(3)):
            sample[5 * i + c] = point[3 * p + c]
        for c in ti.static(range(3, 5)):
            sample[5 * i + c] = 0.0


@ti.kernel
def static_loss(strength: ti.f32, counter: i32buf, sample: f32buf, seen: f32buf, grad_position: f32buf):
    """Background loss, L = strength / n sum_i |position after the warp - before|^2 of static points (section 3.4; there
    of the distance itself, whose gradient does not fade out).

    counter        [4]             in    [0] = n
    sample, seen   [n_samples, 5]  in    after and before the warp
    grad_position  [n_samples, 3]  out
    thread         one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(3)):
            grad_position[3 * i + c] = 2.0 * strength / counter[0] * (sample[5 * i + c] - seen[5 * i + c])


@ti.kernel
def pick_kept_samples(n: ti.i32, seed: ti.i32, step: ti.i32, counter: i32buf, seen: f32buf, sample_ray: i32buf,
                      ray_view: i32buf, weight: f32buf, sample: f32buf, view: i32buf, picked_weight: f32buf):
    """n random ones of a step's samples, for the elastic loss. Each is there three times, one for each axis; its weight
    is such that the sum over the picked ones estimates the mean over all rays of the sum over their samples.

    counter        [4]             in    of the samples: [1] = number of rays
    seen           [n_samples, 5]  in
    sample_ray     [n_samples]     in
    ray_view       [n_rays]        in
    weight         [n_samples]     in    share of a pixel's light, see weigh_samples
    sample         [3 n, 5]        out
    view           [3 n]           out
    picked_weight  [n]             out   counter[0] / (n counter[1]) weight; 0 if there are no samples
    thread         one per picked sample
    """
    for j in range(n):
        i = ti.cast(random_u32(seed, STREAM_ELASTIC, step, j) % ti.u32(ti.max(counter[0], 1)), ti.i32)
        picked_weight[j] = counter[0] / n / ti.max(counter[1], 1) * weight[i]
        for axis in ti.static(range(3)):
            for c in ti.static(range(5)):
                sample[5 * (3 * j + axis) + c] = seen[5 * i + c]
            view[3 * j + axis] = ti.select(counter[0] > 0, ray_view[sample_ray[i]], 0)


@ti.kernel
def warp_tangent_input(window: f32buf, counter: i32buf, sample: f32buf, tangent_input: rows64):
    """Derivative of warp_input in the position along axis a = i % 3, of sample i: in the entries of that axis

        2 pi 2^l w_l cos(2^l pi p_a),  -2 pi 2^l w_l sin(2^l pi p_a)  of its waves,   2 of p_a       and 0 elsewhere

    window         [1]                     in    as in warp_input_forward
    counter        [4]                     in
    sample         [n_samples, 5]          in
    tangent_input  [n_samples] rows of 64  out
    thread         one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(WIDTH)):
            tangent_input[i][c] = 0.0
        axis, w = i % 3, windows(window[0])
        turns = sample[5 * i + axis] - 0.5
        slope = 6.2831853
        for l in ti.static(range(WARP_FREQUENCIES)):
            s_wave, c_wave = wave(turns)
            tangent_input[i][6 * l + 2 * axis] = slope * w[l] * c_wave
            tangent_input[i][6 * l + 2 * axis + 1] = -slope * w[l] * s_wave
            turns *= 2.0
            slope *= 2.0
        tangent_input[i][6 * WARP_FREQUENCIES + axis] = 2.0


@ti.kernel
def mlp_tangent_forward(n_in: ti.i32, n_hidden: ti.i32, capacity: ti.i32, counter: i32buf, tangent: rows64,
                        hidden: rows64, weight: rows64, weight_out: rows16, tangent_hidden: rows64, tangent_y: rows16):
    """Derivative of mlp_forward's y in the direction in which x has the derivative `tangent`: the layers again, but a
    tangent passes where the ReLU passed x. It is linear in each layer's weights as y is: its backward launches are
    mlp_backward_input and mlp_backward_weight, with `hidden` for the ReLUs and tangent_hidden for the products.

    counter         [4]                              in
    tangent         [n_samples] rows of 64           in    the first n_in entries
    hidden          [n_hidden, capacity] rows of 64  in    from mlp_forward
    weight, weight_out                               in
    tangent_hidden  [n_hidden, capacity] rows of 64  out
    tangent_y       [n_samples] rows of 16           out
    thread          one per sample
    """
    for i in range(counter[0]):
        total = row_times_matrix(tangent, i, n_in, weight, 0, row64(0.0))
        tangent_hidden[i] = ti.select(hidden[i] > 0.0, total, row64(0.0))
        h = i
        for l in range(1, n_hidden):
            total = row_times_matrix(tangent_hidden, h, WIDTH, weight, n_in + WIDTH * (l - 1), row64(0.0))
            h += capacity
            tangent_hidden[h] = ti.select(hidden[h] > 0.0, total, row64(0.0))
        tangent_y[i] = row_times_matrix(tangent_hidden, h, WIDTH, weight_out, 0, row16(0.0))


@ti.func
def eigen(A):
    """Eigenvalues of a symmetric 3x3 matrix, and its eigenvectors as a matrix's columns, by Jacobi's rotations."""
    V = ti.Matrix([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for sweep in range(5):
        for a, b in ti.static(((0, 1), (0, 2), (1, 2))):
            if ti.abs(A[a, b]) > 1e-9 * (ti.abs(A[a, a]) + ti.abs(A[b, b])):      # less is rounding, and half^2 inf
                half = 0.5 * (A[b, b] - A[a, a]) / A[a, b]
                tan = ti.select(half >= 0.0, 1.0, -1.0) / (ti.abs(half) + ti.sqrt(half * half + 1.0))
                cos = 1.0 / ti.sqrt(tan * tan + 1.0)
                sin = tan * cos
                for c in ti.static(range(3)):                    # A J
                    first, second = A[c, a], A[c, b]
                    A[c, a], A[c, b] = cos * first - sin * second, sin * first + cos * second
                for c in ti.static(range(3)):                    # J^T A, and V J
                    first, second = A[a, c], A[b, c]
                    A[a, c], A[b, c] = cos * first - sin * second, sin * first + cos * second
                    first, second = V[c, a], V[c, b]
                    V[c, a], V[c, b] = cos * first - sin * second, sin * first + cos * second
    return vec3(A[0, 0], A[1, 1], A[2, 2]), V


@ti.func
def turn_tangent_backward(r, x, dr, dx, a, b, da, db, grad):
    """Gradients (of r, x, dr, dx) of the derivative of turn_backward's y,

        dy = da p + a dp + db q + b dq         p = r x x,  q = r x p,  dp = dr x x + r x dx,  dq = dr x p + r x dp

    and those of da, db, a and b: grad . p, grad . q, grad . dp, grad . dq."""
    p = r.cross(x)
    dp = dr.cross(x) + r.cross(dx)
    grad_dq = b * grad
    grad_dp = a * grad + grad_dq.cross(r)
    grad_q = db * grad
    grad_p = da * grad + grad_dq.cross(dr) + grad_q.cross(r)
    grad_r = dp.cross(grad_dq) + dx.cross(grad_dp) + p.cross(grad_q) + x.cross(grad_p)
    return (grad_r, grad_dp.cross(dr) + grad_p.cross(r), p.cross(grad_dq) + x.cross(grad_dp), grad_dp.cross(r),
            grad.dot(p), grad.dot(r.cross(p)), grad.dot(dp), grad.dot(dr.cross(p) + r.cross(dp)))


@ti.kernel
def elastic_loss(strength: ti.f32, counter: i32buf, sample: f32buf, warp_raw: rows16, tangent_raw: rows16,
                 weight: f32buf, elastic: f32buf, grad_warp_raw: rows16, grad_tangent_raw: rows16):
    """Elastic loss (section 3.3) of sample j, and its gradients. The three derivatives of the warp, column by column,

        J_k = d y / d x_k  with dx = e_k, (dr, dv) = tangent_raw[3 j + k], ds = 2 r . dr in screw_motion's y

    are a matrix J whose singular values, the roots of the eigenvalues of J^T J, are 1 where the warp is rigid:

        e^2 = sum (log singular value)^2 = 1/4 sum_m (log lambda_m)^2     L = weight rho(e),
        rho(e) = 2 (e / c)^2 / ((e / c)^2 + 4), c = ELASTIC_SCALE         (Geman and McClure: what tears, may)
        d e^2 / d J = J V diag(log lambda / lambda) V^T                   V the eigenvectors; no gradient to the weight

    lambda is at least 1e-6 here. L is the paper's; its authors' program has c^2 times that. Where J is next to rigid or
    to singular, gradients lose three digits in f32.
    counter           [4]                     in    [0] = number of samples, three for each j, which are one point
    sample            [n_samples, 5]          in
    warp_raw          [n_samples] rows of 16  in
    tangent_raw       [n_samples] rows of 16  in    from mlp_tangent_forward
    weight            [n_samples / 3]         in
    elastic           [n_samples / 3]         out   rho(e), not weighted
    grad_warp_raw     [n_samples] rows of 16  out   gradient of strength * L: the first 6 entries, at 3 j; else 0
    grad_tangent_raw  [n_samples] rows of 16  out   the first 6 entries
    thread            one per three samples
    """
    for j in range(counter[0] // 3):
        r, v, x, c, y = screw_motion(warp_raw, 3 * j, sample)
        slope = slopes(c)
        curve = slopes(slope)
        J = ti.Matrix([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        for k in ti.static(range(3)):
            i = 3 * j + k
            dr = vec3(tangent_raw[i][0], tangent_raw[i][1], tangent_raw[i][2])
            dv = vec3(tangent_raw[i][3], tangent_raw[i][4], tangent_raw[i][5])
            dx = vec3(1.0 if k == 0 else 0.0, 1.0 if k == 1 else 0.0, 1.0 if k == 2 else 0.0)
            ds = 2.0 * r.dot(dr)
            p, u = r.cross(x), r.cross(v)
            dp, du = dr.cross(x) + r.cross(dx), dr.cross(v) + r.cross(dv)
            dy = dx + ds * (slope[1] * p + slope[2] * (r.cross(p) + u) + slope[3] * r.cross(u)) + dv + c[1] * dp + (
                c[2] * (dr.cross(p) + r.cross(dp) + du)) + c[3] * (dr.cross(u) + r.cross(du))
            for b in ti.static(range(3)):
                J[b, k] = dy[b]

        values, V = eigen(J.transpose() @ J)
        e2 = 0.0
        D = ti.Matrix([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        for m in ti.static(range(3)):
            value = ti.max(values[m], 1e-6)
            e2 += 0.25 * ti.log(value) * ti.log(value)
            D[m, m] = ti.log(value) / value
        ratio = e2 / (ELASTIC_SCALE * ELASTIC_SCALE)
        elastic[j] = 2.0 * ratio / (ratio + 4.0)
        scale = strength * weight[j] * 8.0 / (ELASTIC_SCALE * ELASTIC_SCALE * (ratio + 4.0) * (ratio + 4.0))
        G = J @ V @ D @ V.transpose()

        grad_r, grad_v, grad_s = vec3(0.0), vec3(0.0), 0.0
        for k in ti.static(range(3)):
            i = 3 * j + k
            dr = vec3(tangent_raw[i][0], tangent_raw[i][1], tangent_raw[i][2])
            dv = vec3(tangent_raw[i][3], tangent_raw[i][4], tangent_raw[i][5])
            dx = vec3(1.0 if k == 0 else 0.0, 1.0 if k == 1 else 0.0, 1.0 if k == 2 else 0.0)
            ds = 2.0 * r.dot(dr)
            g = scale * vec3(G[0, k], G[1, k], G[2, k])
            grad_dr, grad_dv, grad_ds = vec3(0.0), g, 0.0
            for n in ti.static(range(1, 3)):         # the terms of x, of c_1 and c_2, and those of v, of c_2 and c_3
                from_r, from_x, from_dr, from_dx, g_da, g_db, g_a, g_b = turn_tangent_backward(
                    r, x if n == 1 else v, dr, dx if n == 1 else dv, c[n], c[n + 1], slope[n] * ds, slope[n + 1] * ds,
                    g)
                grad_r += from_r
                grad_dr += from_dr
                grad_s += slope[n] * g_a + slope[n + 1] * g_b + ds * (curve[n] * g_da + curve[n + 1] * g_db)
                grad_ds += slope[n] * g_da + slope[n + 1] * g_db
                if ti.static(n == 2):
                    grad_v += from_x
                    grad_dv += from_dx
            grad_r += 2.0 * grad_ds * dr
            grad_dr += 2.0 * grad_ds * r
            for b in ti.static(range(3)):
                grad_tangent_raw[i][b] = grad_dr[b]
                grad_tangent_raw[i][3 + b] = grad_dv[b]
        grad_r += 2.0 * grad_s * r
        for k in ti.static(range(3)):
            for b in ti.static(range(3)):
                grad_warp_raw[3 * j + k][b] = grad_r[b] if k == 0 else 0.0
                grad_warp_raw[3 * j + k][3 + b] = grad_v[b] if k == 0 else 0.0


# ---- What no warp explains (Park et al. 2021, "HyperNeRF"): things that appear, or open. A second MLP, told what the
# warp is told, says in which of many canonical scenes to look: two more coordinates w of the field, the ambient ones.
# The density MLP gets them, and waves of them, behind the features of the hash grid.

@ti.kernel
def ambient_forward(first: ti.i32, counter: i32buf, ambient_raw: rows16, feature: rows64):
    """feature[i][first:] = (w;  sin(2^l pi w_c), cos(2^l pi w_c) for l < L, c < 2)        L = AMBIENT_FREQUENCIES

    counter      [4]                     in
    ambient_raw  [n_samples] rows of 16  in    output of the slicing MLP: w, the first 2 entries
    feature      [n_samples] rows of 64  out   2 + 4 L entries from `first` on
    thread       one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(2)):
            feature[i][first + c] = ambient_raw[i][c]
            turns = 0.5 * ambient_raw[i][c]
            for l in range(AMBIENT_FREQUENCIES):
                at = first + 2 + 4 * l + 2 * c
                feature[i][at], feature[i][at + 1] = wave(turns)
                turns *= 2.0


@ti.kernel
def ambient_backward(first: ti.i32, counter: i32buf, ambient_raw: rows16, grad_feature: rows64,
                     grad_ambient_raw: rows16):
    """grad_w_c = grad of w_c + sum_l 2^l pi (cos(2^l pi w_c) grad of the sine - sin(2^l pi w_c) grad of the cosine)

    counter           [4]                     in
    ambient_raw       [n_samples] rows of 16  in
    grad_feature      [n_samples] rows of 64  in    2 + 4 L entries from `first` on
    grad_ambient_raw  [n_samples] rows of 16  out   the first 2 entries
    thread            one per sample
    """
    for i in range(counter[0]):
        for c in ti.static(range(2)):
            turns, slope = 0.5 * ambient_raw[i][c], 3.14159265
            grad = grad_feature[i][first + c]
            for l in range(AMBIENT_FREQUENCIES):
                s_wave, c_wave = wave(turns)
                at = first + 2 + 4 * l + 2 * c
                grad += slope * (c_wave * grad_feature[i][at] - s_wave * grad_feature[i][at + 1])
                turns *= 2.0
                slope *= 2.0
            grad_ambient_raw[i][c] = grad
