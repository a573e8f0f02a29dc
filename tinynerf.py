"""tinynerf: train a neural radiance field from photographs with known camera poses, and render new views of it.

    python tinynerf.py train data/lego        trains, evaluates, and leaves pictures, a video and a model in runs/lego
    python tinynerf.py train --resume runs/lego       goes on where that was interrupted
    python tinynerf.py render runs/lego       renders the model again
    python tinynerf.py eval runs/lego         measures it again
    python tinynerf.py view runs/lego         opens a window onto it
    python tinynerf.py mesh runs/lego         writes its surface as a triangle mesh
    python tinynerf.py bench                  times every kernel
    python tinynerf.py export runs/lego DIR   the model and its kernels for programs in other languages
    python tinynerf.py train data/lego --model mipnerf       another member of the family, see MODELS

kernels.py holds everything that a port to another GPU language has to rewrite; this file is what it can keep: scenes,
buffers, the list of launches (forward, backward), the training loop, rendering and the command line.
"""
import argparse
import concurrent.futures
import contextlib
import gc
import importlib.util
import inspect
import itertools
import json
import math
import os
import pathlib
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
if os.name == "posix" and not os.environ.get("HOME") and not os.environ.get("XDG_CACHE_HOME"):
    os.environ["XDG_CACHE_HOME"] = tempfile.gettempdir()         # without either, Taichi aborts
try:
    import imageio.v3 as imageio
    import numpy as np
    import PIL.Image                                 # comes with imageio
    import PIL.ImageDraw
    import PIL.ImageFont
    import PIL.ImageOps
    import rich.progress
    import taichi as ti
except ModuleNotFoundError as error:
    print(f"tinynerf: the package '{error.name}' is not installed\n"
          "          run the set-up command of README.md (on Debian and Ubuntu, python3-venv first)", file=sys.stderr)
    sys.exit(2)
except ImportError as error:
    print(f"tinynerf: a package cannot be loaded: {' '.join(str(error).split())[:300]}\n          install the library "
          "of the system that is missing, such as libx11-6 of Debian and Ubuntu for libX11.so.6", file=sys.stderr)
    sys.exit(2)

import kernels as k

PIL.Image.MAX_IMAGE_PIXELS = 2**30                   # large photographs are no bombs: see check_fits

VERSION = "0.1"

# Scene and model: the same on every machine
N_CODE = 8                      # numbers learned for each photograph of a capture
N_LEVELS = 6                    # of the hash grid
SURFACE_SLOTS = 4               # a hashed level has so many times resolution^2, to the next power of two: see `table`
TABLE_BOUND = 1e-4              # initial table entries: U(+-1e-4)
LEARNING_RATE, FINAL_RATE = 3e-2, 9e-3     # of the hash table: decays exponentially from the one to the other,
COOL_DOWN = 0.1                 # and to nothing over this last share of the training, so that noise settles
MLP_RATE = 0.5                  # what the MLPs and the codes learn at, in shares of that
BETA_1, BETA_2, EPSILON = 0.8, 0.95, 1e-15
EMPTY_ALPHA = 0.01              # a cell whose steps are less opaque than this counts as empty
DARK_AFTER = 256                # rays end in cells that no light has reached for so many steps
DECAY = 0.974                   # of a cell's density from one update of the occupancy grid to the next
MIN_LIGHT = 0.15                # samples that add less light than this per side of the box are left out
PLACE = 0.5                     # captures: radius of the ball that is not bent, in median distances of the cameras
NEAR = 0.1                      # captures: distance of the nearest sample in such radii
GROWTH = 4.0                    # unbounded scenes: steps grow by GROWTH / (steps along the diagonal) of the distance
DISTORTION = 0.03               # unbounded scenes: strength of the distortion loss
TRANSIENT = 0.1                 # nerfw: strength of the loss that keeps the transient part thin
ELASTIC, STATIC = 1e-3, 1.0     # nerfies: strengths of the losses of what stretches, and of static points that move
WARP_RATE = 0.07                # nerfies: what the warp's MLP and the codes learn at, in shares of LEARNING_RATE
FINE_AT = 0.5                   # nerfies: the share of the training after which the warp gets all frequencies
HOST_MB = 400                   # what Taichi, its compiler and pictures take besides buffers
MESH_LENGTH = 0.01              # a mesh is where half of the light would be gone after so many sides of its cube
SPECK = 0.01                    # parts of a mesh that have less than this share of the largest part's triangles go
LAST_CELL = 2**27               # the count of cells that updates of the occupancy grid looked at is modulo this
READ_EVERY = 16                 # steps between two looks of the host at the counters
CHECKPOINT_SECONDS = 30         # between two checkpoints
WATCH_SECONDS = 5               # between two pictures of train --watch
REPEATS = 31                    # of a step, for bench

# What depends on the machine. march: most samples in flight; batch: samples that a step aims to keep of them, after the
# probe; rays: most rays in flight; coarsest, finest: cells per side of the first and the last level of the hash grid
# (no finer than the pixels); table: most slots of a level; color_layers: hidden layers of the color MLP; grid:
# occupancy cells per side; train_steps, render_steps: samples along the box's diagonal (training jitters them, so that
# coarse steps find thin parts in the mean; a picture needs finer ones); refresh: steps between two updates of the
# occupancy grid, `batch` live cells each; block: rays per thread of the scan; chunk: samples per partial weight
# gradient; hash_chunk: samples per writer of the hash gradient, all of them for plain adds. A training run lasts so
# many seconds or steps, and its video has so many frames.
MACHINES = {
    "cpu": dict(march=2**16, batch=2**15, rays=2**15, coarsest=24, finest=384, table=2**18, color_layers=1, grid=128,
                train_steps=320, render_steps=512, refresh=8, block=16, chunk=128, hash_chunk=2**16, seconds=90,
                frames=48),
    "gpu": dict(march=2**19, batch=2**18, rays=2**18, coarsest=16, finest=2048, table=2**19, color_layers=2, grid=128,
                train_steps=1024, render_steps=1024, refresh=2, block=128, chunk=512, hash_chunk=1, steps=10000,
                frames=96),
}

# What differs where space is unbounded: rays see much more of it, and less sharply, and photographs are less alike.
UNBOUNDED = {"cpu": dict(color_layers=2, train_steps=256, render_steps=256), "gpu": {}}

# The MLPs: inputs, hidden layers (None: color_layers), outputs. Their weights follow the hash table in `params`, one
# MLP after the other.
MLPS = {"density": (N_LEVELS * k.N_FEATURES, 1, k.OUTPUT), "color": (2 * k.OUTPUT, None, 3)}


class UserError(Exception):
    """Something that the user can mend: main() prints what is wrong and a hint, and exits with code 2."""

    def __init__(self, message, hint):
        super().__init__(message)
        self.hint = hint


# ---- Scenes ---------------------------------------------------------------------------------------------------------

# What a frame, or its file for all frames, may say of a lens, and within which bounds: instant-ngp's names
LENS = ("k1", "k2", "k3", "k4", "p1", "p2")
INTRINSICS = {**dict.fromkeys(("fl_x", "fl_y", "w", "h"), (1e-6, 1e6)),
              **dict.fromkeys(("camera_angle_x", "camera_angle_y"), (1e-6, math.pi)),
              **dict.fromkeys(("cx", "cy") + LENS, (-1e6, 1e6))}
CAMERA_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL", "OPENCV_FISHEYE")


def one_line(error):
    """What an exception says, as one line, with its type where it is not made for reading."""
    text = " ".join(str(error).split())[:300]
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__} {text}".strip()


@contextlib.contextmanager
def refusing(problem, hint):
    """Whatever goes wrong meanwhile becomes a UserError: files may come from anyone, and decoders, zip, JSON and NumPy
    have errors of many kinds."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{problem}: {one_line(error)}", hint)


def read_image(path, w=None, h=None):
    """An image file as straight RGBA, [height, width, 4] u8; UserError if it cannot be read, or is no uniform resize of
    w x h, the size that its intrinsics speak of. It is turned as its EXIF entry says only where it fits only then: the
    reconstruction has seen it either way."""
    def fits(width, height):                         # within one pixel
        return w is None or h is None or abs(h * width - w * height) <= max(w, h)
    with refusing(f"cannot use the image {path}", "is it complete? replace it or remove its frame"):
        with PIL.Image.open(path) as image:
            width, height = image.size
            if not fits(width, height):
                if not fits(height, width) or image.getexif().get(0x0112, 1) < 5:        # 5 to 8 are quarter turns
                    raise ValueError(f"it is {width}x{height}, its intrinsics say {w:g}x{h:g}")
                image = PIL.ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):           # 16 bit
                image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.array(image.convert("RGBA"))


def read_mask(path, width, height):
    """Where an image file of this size is not black, whatever its depth or colors: [height, width] bool; UserError."""
    with refusing(f"cannot use the mask {path}", "is it complete?"), PIL.Image.open(path) as image:
        if image.size != (width, height):
            raise ValueError(f"its size is not {width}x{height}")
        values = np.asarray(image if image.mode[0] in "IF" else image.convert("RGB"))
        return values.reshape(height, width, -1).any(-1)


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
    with refusing(f"{path} is not a JSON file", "is the download complete?"), open(path, encoding="utf-8-sig") as file:
        return json.load(file)


def parse_number(key, x, low, high):
    """x, the JSON value of a key, as a float, or None for null; ValueError unless it is a number in (low, high)."""
    if x is None:
        return None
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not low < x < high:     # NaN is not < either
        raise ValueError(f"{key} = {x!r:.40} is not usable")
    return float(x)


def is_line(text):
    """Whether something is text that can be printed in a line, in any script: no controls, no change of direction."""
    return isinstance(text, str) and not re.search(
        "[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", text)


def parse_path(text):
    """A file's name in one spelling; ValueError for what cannot be printed in a line."""
    if not is_line(text):
        raise ValueError(f"{text!r:.40} is not a file's name")
    return posixpath.normpath(text.replace("\\", "/"))


def parse_frame(meta, frame):
    """A frame of a transforms file, with what it leaves to the file, as a namespace: name, mask (or None), pose
    [3, 4] f64, fisheye, time, and a number or None for each of INTRINSICS. ValueError, KeyError, TypeError ..."""
    values = {**meta, **frame}
    name, model, mask = parse_path(values["file_path"]), values.get("camera_model"), values.get("mask_path")
    pose = np.array(values["transform_matrix"], np.float64)
    if pose.shape not in ((3, 4), (4, 4)):
        raise ValueError(f"the transform_matrix of {name} is not 4x4")
    if model is not None and model not in CAMERA_MODELS:
        raise ValueError(f"camera_model {model!r:.40} is none of {', '.join(CAMERA_MODELS)}: "
                         "make perspective images first")
    numbers = {key: parse_number(key, values.get(key), *bounds) for key, bounds in INTRINSICS.items()}
    time = parse_number("time", values.get("time"), -1e6, 1e6)
    if not (numbers["fl_x"] or numbers["camera_angle_x"] or numbers["camera_angle_y"]):
        raise ValueError(f"there is no camera_angle_x and no fl_x for {name}")
    return types.SimpleNamespace(name=name, mask=None if mask is None else parse_path(mask), pose=pose[:3],
                                 fisheye=model == "OPENCV_FISHEYE" or values.get("is_fisheye") is True, time=time,
                                 **numbers)


def find_image(folder, name):
    """The file of a frame's image, or None."""
    endings = ["", ".png", ".jpg", ".jpeg", ".webp"]
    paths = (os.path.join(folder, name + ending) for ending in endings + [ending.upper() for ending in endings])
    return next(filter(os.path.isfile, paths), None)


def count_pixels(path):
    """Pixels of an image file, without reading them; 0 if it is not there or no image."""
    try:
        with PIL.Image.open(path) as image:
            return image.width * image.height
    except Exception:                                # read_image will say what is wrong
        return 0


def is_pose(pose):
    """Whether a camera-to-world matrix [3, 4] is finite, and its 3x3 part a rotation."""
    rotation = pose[:, :3]
    return (np.abs(pose).max() < 1e9 and np.linalg.det(rotation) > 0                    # NaN is not < either
            and np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-2)


def frame_camera(f, width, height, downscale=1):
    """Camera [22], see load_scene, of a frame from parse_frame and its image's size before downscaling."""
    w = f.w or (f.h or height) * width / height
    h = f.h or w * height / width
    fx = f.fl_x or (f.camera_angle_x and 0.5 * w / math.tan(0.5 * f.camera_angle_x))
    fy = f.fl_y or (f.camera_angle_y and 0.5 * h / math.tan(0.5 * f.camera_angle_y))
    cx, cy = 0.5 * w if f.cx is None else f.cx, 0.5 * h if f.cy is None else f.cy
    pixels = np.array([fx or fy, fy or fx, cx, cy]) * (width / w / downscale)
    return np.concatenate([f.pose.ravel(), pixels, [getattr(f, key) or 0.0 for key in LENS]])


def load_view(f, folder, downscale, capture):
    """(view, problem) of a frame from parse_frame. view: a namespace of name, rgba [height, width, 4] u8, lens, camera
    and time (see load_scene), or None if the frame cannot be used. problem: None, or (what it has, which it is)."""
    if not is_pose(f.pose):
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
        trains, masks = rgba[..., 3] >= 128, {} if f.mask is None else {os.path.join(folder, f.mask): True}
        moving = os.path.join(os.path.dirname(path), f"dynamic_mask_{os.path.splitext(os.path.basename(path))[0]}.png")
        if os.path.isfile(moving):                   # from instant-ngp's colmap2nerf.py: what is black trains
            masks[moving] = False
        for mask, wanted in masks.items():
            try:
                trains &= read_mask(mask, width, height) == wanted
            except UserError:
                problem = ("a mask that cannot be read or has another size: it is not used", mask)
        rgba[..., 3] = np.where(trains, 255, 0)
    if downscale > 1:
        full, rgba = rgba, downscale_image(rgba, downscale)
        if capture:                                  # the mean of such pixels trains if all of them do
            rows, columns = rgba.shape[0] * downscale, rgba.shape[1] * downscale
            rgba[..., 3] = full[:rows, :columns, 3].reshape(len(rgba), downscale, -1, downscale).min((1, 3))

    if capture and not rgba[..., 3].any():
        return None, ("no pixel that counts", f.name)
    camera = frame_camera(f, width, height, downscale)
    return types.SimpleNamespace(name=f.name, rgba=rgba, lens=int(f.fisheye), camera=camera, time=f.time,
                                 still=f.still), problem


def load_frames(path, meta, folder, downscale, capture):
    """(views, lines) of a transforms file: load_view's namespaces, for a capture those that are usable, sorted by name;
    and what was wrong with how many frames. The Blender family's frames must all be usable: UserError."""
    with refusing(f"{path} is not usable",
                  "it needs camera_angle_x or fl_x, and frames with file_path and a 4x4 transform_matrix"):
        frames = [parse_frame(meta, frame) for frame in meta["frames"]]
        if not frames:
            raise ValueError("there are no frames")
    wrong, n_frames = {}, len(frames)
    for i, frame in enumerate(frames):               # where nobody says when: one after the other
        frame.still = frame.time is None
        frame.time = i / max(n_frames - 1, 1) if frame.still else frame.time
    if capture:
        unique = {frame.name: frame for frame in reversed(frames)}
        wrong["the name of an earlier frame"] = [frame.name for frame in frames if frame is not unique[frame.name]]
        frames = [unique[name] for name in sorted(unique)]
    n_pixels = [count_pixels(find_image(folder, frame.name)) for frame in frames]
    kept, each, free = 4e-6 * sum(n_pixels) / downscale**2, 16e-6 * max(n_pixels), free_mb()
    check_fits(f"reading the {len(frames)} images of {path}", kept + each, f"use --downscale {2 * downscale}")
    n = count_cores() if free is None else int(min(count_cores(), (free - kept) / max(each, 1e-6)))
    with concurrent.futures.ThreadPoolExecutor(max(n, 1)) as pool:           # each has an image in full at a time
        views, problems = zip(*pool.map(lambda frame: load_view(frame, folder, downscale, capture), frames))
    for what, which in filter(None, problems):
        wrong.setdefault(what, []).append(which)
    lines = [f"{len(which)} of {n_frames} frames {'has' if len(which) == 1 else 'have'} {what} (first: {which[0]})"
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
    """Those of aabb_scale, scale (> 0) and offset (3 numbers, or one for all) that a transforms file has. ValueError,
    TypeError."""
    placement = {key: parse_number(key, meta.get(key), 0, 1e6) for key in ("aabb_scale", "scale")}
    offset = meta.get("offset")
    if offset is not None:
        offset = offset if isinstance(offset, list) else 3 * [offset]
        placement["offset"] = [parse_number("offset", x, -1e6, 1e6) for x in offset]
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
        with refusing(f"cannot convert {folder}", "is it complete? see data/README.md"):
            meta = module.convert(folder)
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
                                 outlined=not opaque and alpha == "background" and all(
                                     view.still and view.lens == 0 and not view.camera[16:].any() for view in views),
                                 time=np.array([view.time for view in views], np.float32),
                                 names=[view.name for view in views])


def view_image(views, i):
    """View i as straight RGBA, [height, width, 4] u8; not a copy."""
    first, width, height, _ = views.size[i]
    return views.pixels[first:first + width * height].view(np.uint8).reshape(height, width, 4)


def select_views(views, mask):
    """The views that a boolean mask [n] picks, as a namespace like load_scene's."""
    return pack_views([types.SimpleNamespace(name=views.names[i], rgba=view_image(views, i), lens=views.size[i, 3],
                                             camera=views.camera[i], time=views.time[i], still=views.outlined)
                       for i in np.flatnonzero(mask)], views.alpha)


def load_scene(folder, downscale=1, moved=None):
    """A scene's folder: transforms_train.json (the Blender family), transforms.json (instant-ngp, nerfstudio) or what
    data/convert.py knows. UserError for what cannot be used; moved: a hint if it is gone. Returns a namespace:

    train, test   views, each a namespace of
        pixels    u32 [sum of width * height]: straight RGBA of 8 bits each, red in the lowest; view by view, by rows
        size      i32 [n, 4]: first pixel, width, height, lens (0: perspective, 1: fisheye)
        camera    f32 [n, 22]: camera-to-world matrix [3, 4], y up, z back, in the scene's own units; fx, fy, cx, cy in
                  pixels, whose corner is at 0; OpenCV's k1, k2, k3, k4, p1, p2
        time      f32 [n]: the moment it shows, of moving scenes; where the file has none, its place in the list
        names     n paths
        alpha     "none": all 255; "background": it shows the background; "mask": pixels with 0 do not train, others 255
        outlined  nothing is where alpha is 0: it is "background", no lens has distortion, no frame has a time
    split         what is held out as test: "test", "val", "test_filenames", "val_filenames", "every 8th of train"
    capture       False for the Blender family
    placement     what the file says of aabb_scale, scale and offset, see instant-ngp
    skipped       lines that say what was left out
    points        f32 [n, 3], places in the scene's units that never move: points.npy, if there is one, else none
    """
    if not os.path.isdir(folder):
        raise UserError(f"no such folder: {folder}", moved or "data/lego comes along; data/README.md lists others")
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
        with refusing(f"{source} is not usable", "mend or remove that entry"):
            placement = read_placement(meta) if capture else {}
            train, test, split = split_views(meta if capture else {}, train)
        if len(train) < (2 if capture else 1):       # so many or more: then there is one to test with, too
            raise UserError(f"{source} has {len(train) + len(test)} usable views, {len(train)} of them to train on",
                            "; ".join(skipped) or "a radiance field needs several views")
    origin = np.array([view.camera[3:12:4] for view in train])
    middle = origin.mean(0)
    reach, away = np.linalg.norm(origin - middle, axis=1).max(), np.linalg.norm(middle)
    if capture and reach < 1e-4 * (1 + away):
        raise UserError(f"{source}: all cameras are in one place as seen from the origin: within {reach:.3g} units, "
                        f"{away:.3g} units away from it", "depth shows only from several places; if they are several, "
                        "subtract their mean from all positions")
    alpha = "mask" if capture else "background"
    return types.SimpleNamespace(train=pack_views(train, alpha), test=pack_views(test, alpha), split=split,
                                 capture=capture, placement=placement, skipped=skipped, points=read_points(folder))


def read_points(folder):
    """The points in a folder's points.npy (Nerfies' data sets have such a file), [n, 3] f32; none without it."""
    path = os.path.join(folder, "points.npy")
    if not os.path.exists(path):
        return np.zeros((0, 3), np.float32)
    with refusing(f"{path} is not usable", "it is the points that never move; remove it"):
        points = np.load(path)                       # which takes no pickles
        if points.ndim != 2 or not len(points) or points.shape[1] != 3 or points.dtype.kind != "f" or (
                not np.abs(points).max() < 1e9):
            raise ValueError("it does not hold an [n, 3] array of finite numbers, n > 0")
        return points.astype(np.float32)


def place_scene(scene):
    """Where the unit cube lies in the world: a namespace with center [3] and side in world units, unbounded (1 if all
    of space is contracted into the cube, see k.contract), near (the nearest sample, in sides of the cube).

    Blender scenes have the box of +-1.5. In the other formats a placement in the file wins, by instant-ngp's rules:
    cube = world scale + offset, and an aabb_scale of 1 or less says that nothing is outside. Otherwise the ball that
    stays unbent is put around what the cameras look at, as large as they are far away.
    """
    if not scene.capture:
        return types.SimpleNamespace(center=[0.0, 0.0, 0.0], side=3.0, unbounded=0, near=0.05 / 3.0)
    given = scene.placement
    if "scale" in given or "offset" in given or given.get("aabb_scale", 16) <= 1:
        scale, unbounded = given.get("scale", 0.33), int(given.get("aabb_scale", 16) > 1)
        center = [(0.5 - offset) / scale for offset in given.get("offset", (0.5, 0.5, 0.5))]
        side = (0.5 / k.RADIUS if unbounded else 1.0) / scale        # instant-ngp's unit cube is as wide as the ball
    else:
        origin, center = scene.train.camera[:, 3:12:4], nearest_to_axes(scene.train.camera)
        far, reach = (np.linalg.norm(origin - point, axis=1) for point in (center, origin.mean(0)))
        side = PLACE * float(max(np.median(far), 1e-2 * reach.max())) / k.RADIUS         # most may be where all look
        center, unbounded = [float(c) for c in center], 1
    return types.SimpleNamespace(center=center, side=side, unbounded=unbounded, near=NEAR * k.RADIUS)


def over_white(rgba):
    """Straight RGBA u8 over a white background: rgb f32 in [0, 1]."""
    x = rgba.astype(np.float32) / 255.0
    return x[..., :3] * x[..., 3:] + 1.0 - x[..., 3:]


# ---- Model: every buffer, and the lists of launches -----------------------------------------------------------------

def level_layout(settings, n_levels=N_LEVELS):
    """[n_levels, 4] i32 for the hash kernels: resolution, first slot, number of slots, 1 if hashed.

    Resolutions grow geometrically (instant-ngp, equation 3), rounded; n_levels < N_LEVELS leaves out the finest.
    A level whose (resolution + 1)^3 vertices fit into `table` slots is dense. The others are hashed into SURFACE_SLOTS
    resolution^2 slots, to the next power of two, or into `table` if that is less: what is next to surfaces grows with
    resolution^2.
    """
    coarsest, table_slots, rows, first = settings["coarsest"], settings["table"], [], 0
    for l in range(n_levels):
        resolution = round(coarsest * (settings["finest"] / coarsest) ** (l / (N_LEVELS - 1)))
        n_vertices, n_on_surfaces = (resolution + 1) ** 3, SURFACE_SLOTS * resolution**2
        dense = n_vertices <= table_slots
        hashed_slots = min(table_slots, 2 ** (n_on_surfaces - 1).bit_length())
        rows.append((resolution, first, n_vertices if dense else hashed_slots, 0 if dense else 1))
        first += rows[-1][2]
    return np.array(rows, np.int32)


def count_rows(n_in, n_hidden, n_out):
    """Number of rows of 64 weights in an MLP, see kernels.py."""
    return n_in + k.WIDTH * (n_hidden - 1) + n_out


class Model:
    """The field's parameters and all buffers of a step. n = march, the most samples in flight."""

    name, marches = "ngp", True                      # see MODELS; whether an occupancy grid says where samples may be,
    endless = True                                   # and whether they may be anywhere in space
    KEPT = ("params", "occupancy", "moment", "density_grid", "lit_step")     # what later steps depend on,
    DRAWN = ("params", "occupancy")                                          # and those that a picture needs
    nets, more_mlps = (), {}                         # deep networks, see NeRF; MLPs of the family's models
    coded, code_sets, moves = ("color",), 1, False   # MLPs that get photographs' codes, how many each; see Nerfies
    decay, progress = None, 0.0                      # if it is another than DECAY; how far training is, 0..1
    rate_shares = ()                                 # (n, first, share) of all rows of params, where rates differ
    next_view = (0, 0)                               # turn through the views, and place in it: see k.pick_pixels

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        """settings: an entry of MACHINES; space: from place_scene; n_photos: that get codes, for their differences. A
        model that only renders (training=False) has no gradients; one that is dry only counts its buffers."""
        self.settings, self.space, self.n_photos, self.n_levels = settings, space, n_photos, n_levels
        self.dry = dry
        n_code = N_CODE if n_photos else 0
        self.n_code = n_code * ("color" in self.coded)           # of the color MLP
        n, n_rays, cells = settings["march"], settings["rays"], settings["grid"] ** 3
        layout = level_layout(settings, n_levels)
        self.n_slots = int(layout[:, 2].sum())
        mlps = {name: (n_in + n_code * (name in self.coded), n_hidden or settings["color_layers"], n_out)
                for name, (n_in, n_hidden, n_out) in {**MLPS, **self.more_mlps}.items()}
        self.n_weights = k.WIDTH * sum(count_rows(*mlp) for mlp in mlps.values())
        self.first_code = self.n_slots * k.N_FEATURES + self.n_weights
        self.n_codes = n_code * (n_photos + 1)                   # numbers; one code more: the neutral one
        self.n_rows = (self.first_code + self.code_sets * self.n_codes) // k.N_FEATURES
        self.pitch = self.n_weights // k.N_FEATURES + 4          # rows of a chunk in `partial`
        self.rate_shares = (self.n_slots, 0, 1.0), (self.n_rows - self.n_slots, self.n_slots, MLP_RATE)

        f32, i32, u32 = ti.f32, ti.i32, ti.u32
        self.buffers, self.graphs = [], {}                       # see replay()
        self.params = self.new(k.rowF, self.n_rows)              # the hash table's slots, the MLPs' weights, the codes
        self.level = self.load(layout)                           # [n_levels, 4]
        self.occupancy = self.new(u32, cells // 2048 * 129 + 6)    # bits, and a box around them
        self.mlps, first = [], self.n_slots * k.N_FEATURES
        for name, mlp in mlps.items():
            setattr(self, name, self.new_mlp(first, *mlp))
            first += k.WIDTH * self.mlps[-1].n_rows

        self.ray_pixel = self.new(i32, n_rays)                   # index of the pixel
        self.ray_view = self.new(i32, n_rays)                    # and its view
        self.ray_code = self.new(i32, n_rays)                    # the code that it is seen with
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
        self.march_sigma = self.new(f32, n)                      # and which are kept: see k.probe_rays
        self.counter = self.new(i32, 4)
        self.sample = self.new(f32, 5 * n)
        self.sample_ray = self.new(i32, n)
        self.feature = self.new(k.row64, n)
        self.density_hidden = self.new(k.row64, n)
        self.geometry = self.new(k.row16, n)                     # [0] becomes sigma, all of it goes to the color MLP
        self.color_input = self.new(k.row64, n)                  # geometry, spherical harmonics, code
        self.color_hidden = self.new(k.row64, self.color.n_hidden * n)
        self.color_raw = self.new(k.row16, n)                    # 3 are used
        self.rgb_sigma = self.new(f32, 4 * n)
        self.view_size = self.new(i32, 4)                        # of the view that is rendered
        self.view_camera = self.new(f32, k.CAMERA)
        if not training:
            return

        self.grad_params = self.new(k.rowF, self.n_rows)
        self.moment = self.new(k.rowF, 2 * self.n_rows)          # Adam's m, v
        self.partial = self.new(k.rowF, -(-n // settings["chunk"]) * self.pitch)
        self.loss = self.new(f32, n_rays)
        self.grad_pixel = self.new(f32, 4 * n_rays)
        self.grad_color_input = self.new(k.row64, n)
        self.grad_color_hidden = self.new(k.row64, self.color.n_hidden * n)
        # Gradients take the place of what nobody reads any more by then: less memory, and it is in the cache
        self.grad_color_raw, self.grad_geometry = self.color_raw, self.geometry
        self.grad_density_hidden, self.grad_feature = self.grad_color_hidden, self.color_input
        self.grad_rgb_sigma = self.new(f32, 4 * n)
        self.density_grid = self.new(f32, cells)                 # -1 in cells that are given up
        self.lit_step = self.new(i32, cells)                     # the last step in which light reached the cell
        self.block_density = self.new(f32, 2 * -(-cells // 1024))
        self.threshold = self.new(f32, 1)
        self.brick_span = self.new(i32, cells // 16)             # first live cell, number of live cells
        self.brick_start = self.new(i32, -(-cells // 1024))      # of the scan's blocks of 32 bricks
        self.live_counter = self.new(i32, 4)
        self.live_cell = self.new(i32, cells)                    # numbers of the cells that were not given up
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

    def load(self, x):
        """A buffer with the numbers of an array, f32, i32 or u32."""
        buffer = self.new({"f": ti.f32, "i": ti.i32, "u": ti.u32}[x.dtype.kind], x.size)
        if not self.dry:
            buffer.from_numpy(x.ravel().astype(x.dtype.kind + "4", copy=False))
        return buffer

    def new_mlp(self, first, n_in, n_hidden, n_out):
        """Sizes and rows of an MLP whose weights are the numbers of `params` from `first` on."""
        n_rows = count_rows(n_in, n_hidden, n_out)
        self.mlps.append(types.SimpleNamespace(
            n_in=n_in, n_hidden=n_hidden, n_out=n_out, n_rows=n_rows, first=first, weight=self.new(k.row64, n_rows),
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


def scan(n, block, capacity, span, block_start, counter):
    """Numbers of samples to spans."""
    k.sum_counts(n, block, span, block_start)
    k.scan_blocks(n, block, capacity, block_start, counter)
    k.claim_spans(n, block, block_start, span)


def step_size(m, n_steps):
    """(step length, growth) for about n_steps samples along the box's diagonal: see k.step_distance."""
    return math.sqrt(3.0) / n_steps, m.space.unbounded * GROWTH / n_steps


def march(m, n_rays, limit, n_steps):
    """Rays to samples: at most `limit` more per ray."""
    grid, unbounded = m.settings["grid"], m.space.unbounded
    step, block, capacity = step_size(m, n_steps), m.settings["block"], m.settings["march"]
    k.count_samples(n_rays, limit, *step, unbounded, grid, m.ray, m.ray_step, m.pixel, m.occupancy, m.march_span)
    scan(n_rays, block, capacity, m.march_span, m.block_start, m.march_counter)
    k.write_samples(n_rays, limit, *step, unbounded, grid, m.ray, m.ray_step, m.occupancy, m.march_span, m.march_sample)
    if unbounded:
        k.contract_samples(m.march_counter, m.march_sample)


def probe(m, counter):
    """Density at points, of the occupancy grid's cells or of a mesh."""
    k.hash_encode_forward(m.n_levels, counter, m.level, m.march_sample, m.params, m.march_feature)
    k.probe_density(m.density.n_in, counter, m.march_feature, m.density.weight, m.march_sigma)


def mlp_forward(m, net, counter, x, hidden, y):
    """An MLP, from its inputs to its outputs; `hidden` has its layers then."""
    k.mlp_forward(net.n_in, net.n_hidden, m.settings["march"], counter, x, net.weight, net.weight_out, hidden, y)


def mlp_backward(m, net, first, counter, x, hidden, grad_y, grad_hidden, grad_x, products=None):
    """Mirror of mlp_forward(): from grad_y to grad_x, and to m.partial, which begins with number `first` of `params`.
    `hidden` says what the ReLUs let through; products: what the layers put out, where that is something else."""
    capacity = m.settings["march"]
    k.mlp_backward_input(net.n_hidden, net.n_out, capacity, counter, hidden, net.weight_t, grad_y, grad_hidden, grad_x)
    k.mlp_backward_weight(net.n_in, net.n_hidden, net.n_out, capacity, m.settings["chunk"], m.pitch,
                          (net.first - first) // k.N_FEATURES, counter, x, hidden if products is None else products,
                          grad_hidden, grad_y, m.partial)


def sum_partials(m, n_weights, first, counter):
    """m.partial to grad_params, where its n_weights numbers begin with number `first`."""
    k.sum_partials(n_weights // k.N_FEATURES, m.settings["chunk"], m.pitch, first // k.N_FEATURES, counter, m.partial,
                   m.grad_params)


def forward(m, n_rays, n_steps, first_code):
    """Marched samples to pixels: density decides which of them are kept, and only those go on. first_code: where in
    `params` the codes of the views begin."""
    capacity = m.settings["march"]
    if m.moves:
        warp_march(m, n_rays, m.march_span, m.ray_view, first_code, m.march_counter)
    k.probe_rays(n_rays, m.n_levels, m.density.n_in, MIN_LIGHT * step_size(m, n_steps)[0], m.march_span, m.level,
                 m.march_sample, m.params, m.density.weight, m.pixel, m.march_feature, m.march_sigma)
    k.count_visible_samples(n_rays, m.march_span, m.march_sigma, m.ray_span)
    scan(n_rays, m.settings["block"], capacity, m.ray_span, m.block_start, m.counter)
    k.keep_visible_samples(n_rays, m.march_span, m.march_sample, m.march_feature, m.march_sigma, m.ray_span,
                           m.sample, m.feature, m.sample_ray)
    shade(m, first_code)
    k.composite_forward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.pixel, m.depth)


def shade(m, first_code):
    """The part of forward() that asks the field: from the features of samples to their density and color."""
    counter = m.counter
    mlp_forward(m, m.density, counter, m.feature, m.density_hidden, m.geometry)
    k.density_head_forward(counter, m.geometry, m.rgb_sigma)
    k.color_input_forward(m.n_code, first_code, counter, m.geometry, m.sample_ray, m.ray, m.ray_code, m.params,
                          m.color_input)
    mlp_forward(m, m.color, counter, m.color_input, m.color_hidden, m.color_raw)
    k.color_head_forward(0.0, counter, m.color_raw, m.rgb_sigma)


def backward(m, n_rays):
    """Mirror of forward() for the samples that were kept, bottom to top: from grad_pixel to grad_params."""
    k.composite_backward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.pixel, m.grad_pixel, m.grad_rgb_sigma)
    spread_backward(m, n_rays, m.march_counter, m.ray_span, m.sample)
    color_backward(m, m.first_code)
    field_backward(m)


def field_backward(m):
    """The rest of backward(): from grad_color_input to grad_params."""
    counter, chunk = m.counter, m.settings["hash_chunk"]
    k.density_head_backward(counter, m.rgb_sigma, m.grad_rgb_sigma, m.grad_color_input, m.grad_geometry)
    mlp_backward(m, m.density, m.density.first, counter, m.feature, m.density_hidden, m.grad_geometry,
                 m.grad_density_hidden, m.grad_feature)
    n_chunks = max(512, -(-m.settings["march"] // chunk))             # a CPU takes 512 turns of a loop as one task
    k.clear_gradients(m.n_slots, 0, m.grad_params)
    k.hash_encode_backward(m.n_levels, n_chunks, chunk, counter, m.level, m.sample, m.grad_feature, m.grad_params)
    sum_partials(m, m.n_weights, m.density.first, counter)


def spread_backward(m, n_rays, counter, span, sample):
    """The distortion loss of unbounded scenes, into grad_rgb_sigma."""
    if m.space.unbounded:
        k.distortion_loss(n_rays, m.settings.get("distortion", DISTORTION), counter, span, sample, m.rgb_sigma,
                          m.grad_rgb_sigma)


def color_backward(m, first_code):
    """The part of backward() that ends in the views' codes: from grad_rgb_sigma to grad_color_input."""
    k.color_head_backward(0.0, m.counter, m.rgb_sigma, m.grad_rgb_sigma, m.grad_color_raw)
    mlp_backward(m, m.color, m.density.first, m.counter, m.color_input, m.color_hidden, m.grad_color_raw,
                 m.grad_color_hidden, m.grad_color_input)
    if m.n_code:
        code_backward(m, m.n_code, first_code, m.counter, m.sample_ray, m.ray_code, m.grad_color_input)


def code_backward(m, n_code, first, counter, owner, view, grad_input):
    """From the inputs of an MLP to the codes among them."""
    chunk = m.settings["hash_chunk"]
    k.code_backward(n_code, first, -(-m.settings["march"] // chunk), chunk, counter, owner, view, grad_input,
                    m.grad_params)


def adam(m, step, learning_rate):
    """One step of the optimiser, the step-th (from 1), with Adam's bias corrections folded into the rate. The gradients
    are used up then: the next step's are added from 0 on, in the hash table from field_backward() on."""
    rate = learning_rate * math.sqrt(1.0 - BETA_2**step) / (1.0 - BETA_1**step)
    for n, first, share in m.rate_shares or [(m.n_rows, 0, 1.0)]:
        k.adam_step(n, first, share * rate, BETA_1, BETA_2, EPSILON, m.params, m.grad_params, m.moment)
    k.clear_gradients(m.n_rows - m.n_slots, m.n_slots, m.grad_params)
    load_weights(m)


def start_occupancy(m, views, view_bound):
    """Cells start as unknown; those that no camera sees, or that alpha shows to be empty, are given up for good.
    view_bound [n_views, 4] f32 is written."""
    grid, space = m.settings["grid"], m.space
    k.bound_views(views.n, views.size, views.camera, view_bound)
    k.mark_visible_cells(grid, space.unbounded, views.n, space.near, views.camera, view_bound, m.density_grid)
    if views.outlined:
        k.carve_cells(grid, views.n, views.size, views.camera, views.pixels, m.density_grid)
    list_live(m, views)
    pack_occupancy(m, 0, k.END)


def list_live(m, views):
    """The live cells, which are what updates of the occupancy grid look at, and the part of each view they lie in."""
    grid, n_bricks = m.settings["grid"], m.settings["grid"] ** 3 // 32
    k.count_live_cells(grid, m.density_grid, m.brick_span)
    scan(n_bricks, 32, grid**3, m.brick_span, m.brick_start, m.live_counter)
    k.list_live_cells(grid, m.density_grid, m.brick_span, m.live_cell)
    if views.cropped:
        k.crop_views(grid, views.n, views.size, views.camera, m.live_counter, m.live_cell, views.margin)


def update_occupancy(m, n_cells, first, seed, step):
    """Look at n_cells live cells of the occupancy grid anew, or at all if there are fewer. first: the sum of n_cells of
    all updates before, modulo LAST_CELL."""
    k.place_cell_samples(n_cells, first, m.settings["grid"], *step_size(m, m.settings["train_steps"]), seed, step,
                         m.live_counter, m.live_cell, m.march_sample, m.cell_counter)
    if m.moves:                                      # each at some moment
        k.pick_moments(n_cells, m.n_photos, seed, step, m.cell_view)
        warp_march(m, n_cells, m.each_span, m.cell_view, m.first_code, m.cell_counter)
    probe(m, m.cell_counter)
    k.update_density_grid(first, m.decay or DECAY, m.cell_counter, m.live_counter, m.live_cell, m.march_sample,
                          m.march_sigma, m.density_grid)
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


def compare_pixels(m, n_rays, views, seed, step, counter, share=1.0):
    """Loss of the pixels of a training step, which counts by a share, and its gradient in their colors."""
    random_background = int(m.space.unbounded or views.alpha == "background")
    k.loss_and_gradient(n_rays, share, random_background, int(views.alpha == "mask"), seed, step, counter, m.ray_pixel,
                        views.pixels, m.ray_step, m.pixel, m.loss, m.grad_pixel, m.bad_step)


def pick(m, n_rays, views, seed):
    """The pixels of a training step."""
    k.pick_pixels(n_rays, views.n, *m.next_view, seed, views.size, views.margin, m.ray_pixel, m.ray_view, m.ray_code)


def train_step(m, n_rays, views, seed, step, learning_rate):
    """One step on the n_rays pixels of `views` (a namespace made by upload_views) from m.next_view on. Nothing is read
    back."""
    pick(m, n_rays, views, seed)
    compare(m, n_rays, views, seed, step, m.first_code)
    k.mark_lit_cells(n_rays, m.settings["grid"], step, m.march_span, m.march_sample, m.march_sigma, m.lit_step)
    backward(m, n_rays)
    adam(m, step + 1, learning_rate)


def neutral_code(m):
    """Where in `params` the code begins that pictures are drawn with."""
    return m.first_code + m.n_codes - m.n_codes // (m.n_photos + 1)


def draw_rays(m, n_rays):
    """Rays that are rendered to pixels, in waves: each takes those that light still gets through a few samples
    further."""
    n_steps, limit = m.settings["render_steps"], 8
    while True:
        replay(march, m, n_rays, limit, n_steps)
        n_samples, n_kept = m.march_counter.to_numpy()[:2]
        if n_samples == 0 and n_kept == n_rays:
            break
        replay(forward, m, n_rays, n_steps, neutral_code(m))
        limit = min(2 * limit, m.settings["march"] // m.settings["block"])


def to_cube(camera, space):
    """Cameras [n, 22] in world units as cameras of the unit cube: the scene's box, shifted and scaled."""
    camera = camera.copy()
    camera[:, 3:12:4] = (camera[:, 3:12:4] - space.center) / space.side + 0.5
    return camera


def upload_views(m, views):
    """Views (see load_scene) on the device: pixels u32, size and margin [n, 4] i32, camera [n, 22] f32 in the unit
    cube. outlined: alpha shows which cells of the occupancy grid are empty; cropped: margins, too, unless there are too
    many views. Margins begin as k.crop_views wants them."""
    outlined = views.outlined and m.marches and not m.space.unbounded and not m.moves
    cropped = outlined and len(views.size) * m.settings["grid"] ** 3 < 2**31
    middle = views.size[:, 1:3] // 2
    margin = cropped * np.hstack([middle, views.size[:, 1:3] - 1 - middle])
    return types.SimpleNamespace(
        pixels=m.load(views.pixels), size=m.load(views.size), camera=m.load(to_cube(views.camera, m.space)),
        margin=m.load(margin), n=len(views.size), alpha=views.alpha, outlined=outlined, cropped=cropped, points=None)


@contextlib.contextmanager
def wrapped_kernels(wrap):
    """Every kernel is wrap(name, kernel) for a while."""
    plain = {name: kernel for name, kernel in vars(k).items() if hasattr(kernel, "_is_wrapped_kernel")}
    try:
        vars(k).update((name, wrap(name, kernel)) for name, kernel in plain.items())
        yield
    finally:
        vars(k).update(plain)


def replay(launch, m, *arguments):
    """launch(m, *arguments), which does nothing but launch kernels (what else it does comes first), by one call for all
    of them: a launch from Python takes most of 0.1 ms. They are noted anew each time, for the scalars they get; the
    graph that a list of kernels and buffers becomes is kept in m.graphs."""
    launches, given = [], {}
    with wrapped_kernels(lambda name, kernel: lambda *values: launches.append((kernel, values))):
        launch(m, *arguments)
    key = ()
    for kernel, values in launches:
        names = [f"buffer {id(x)}" if isinstance(x, ti.Ndarray) else f"scalar {len(given)}.{i}"
                 for i, x in enumerate(values)]
        given.update(zip(names, (x.item() if isinstance(x, np.generic) else x for x in values)))
        key += (kernel, *names),
    if key not in m.graphs:
        builder, known = ti.graph.GraphBuilder(), {}
        for kernel, *names in key:
            for name, kind in zip(names, kernel.__annotations__.values()):
                if name not in known and name.startswith("buffer"):
                    known[name] = ti.graph.Arg(ti.graph.ArgKind.NDARRAY, name, kind.dtype, ndim=1)
                elif name not in known:
                    known[name] = ti.graph.Arg(ti.graph.ArgKind.SCALAR, name, kind)
            builder.dispatch(kernel, *(known[name] for name in names))
        m.graphs[key] = builder.compile()
    m.graphs[key].run(given)


# ---- The family: other models, of the stages in Part II of kernels.py -----------------------------------------------

class NeRF(Model):
    """Mildenhall et al. 2020: rays are sampled from end to end, at first coarsely, then where that found something; two
    networks, deep ones, of which the second sees the samples of both lots. There is neither hash grid nor occupancy
    grid. n = march, the most samples of either lot."""
    name, marches, endless, KEPT, DRAWN = "nerf", False, False, ("params", "moment"), ("params",)

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        n = settings["march"]
        n_rays = max(1, n // (settings["coarse"] + settings["fine"]))        # so that none is ever dropped
        self.settings, self.space, self.n_photos = {**settings, "rays": n_rays}, space, n_photos
        self.n_levels, self.dry, self.n_code, self.n_slots = n_levels, dry, 0, 0
        self.mlps, self.nets, self.buffers, self.graphs, f32, i32 = [], [], [], {}, ti.f32, ti.i32
        self.new_nets()
        self.n_rows = sum(net.n_weights for net in self.nets) // k.N_FEATURES
        self.pitch = max(net.n_weights for net in self.nets) // k.N_FEATURES + 4     # rows of a chunk in `partial`
        self.params = self.new(k.rowF, self.n_rows)              # of one network after the other

        self.ray_pixel, self.ray_view, self.ray_code = (self.new(i32, n_rays) for _ in range(3))
        self.ray, self.ray_step = self.new(f32, 8 * n_rays), self.new(i32, n_rays)
        self.pixel, self.depth = self.new(f32, 4 * n_rays), self.new(f32, n_rays)
        self.block_start = self.new(i32, -(-n_rays // settings["block"]))
        self.coarse, self.fine = (types.SimpleNamespace(
            net=net, span=self.new(i32, 2 * n_rays), counter=self.new(i32, 4), sample=self.new(f32, 5 * n),
            sample_ray=self.new(i32, n)) for net in (self.nets[0], self.nets[-1]))
        self.march_counter, self.counter = self.coarse.counter, self.fine.counter
        self.weight = self.new(f32, n)                           # of the coarse samples in their pixels
        self.feature = self.new(k.row64, n)                      # frequencies
        self.hidden = [self.new(k.row64, layer.n_out * n) for layer in self.nets[-1].layers]
        self.density_hidden, self.geometry = self.new(k.row64, n), self.new(k.row16, n)
        self.color_input, self.color_hidden = self.new(k.row64, n), self.new(k.row64, n)
        self.color_raw, self.rgb_sigma = self.new(k.row16, n), self.new(f32, 4 * n)
        self.view_size, self.view_camera = self.new(i32, 4), self.new(f32, k.CAMERA)
        if not training:
            return

        self.grad_params, self.moment = self.new(k.rowF, self.n_rows), self.new(k.rowF, 2 * self.n_rows)
        self.partial = self.new(k.rowF, -(-n // settings["chunk"]) * self.pitch)
        self.loss, self.bad_step = self.new(f32, n_rays), self.new(i32, 1)
        self.grad_pixel, self.grad_rgb_sigma = self.new(f32, 4 * n_rays), self.new(f32, 4 * n)
        self.grad_color_raw, self.grad_color_hidden = self.new(k.row16, n), self.new(k.row64, n)
        self.grad_color_input, self.grad_geometry = self.new(k.row64, n), self.new(k.row16, n)
        self.grad_density_hidden = self.new(k.row64, n)
        layers = itertools.zip_longest(*([layer.n_out for layer in net.layers] for net in self.nets), fillvalue=0)
        self.grad_hidden = [self.new(k.row64, max(n_out) * n) for n_out in layers]           # of either network

    def new_nets(self):
        """Networks of 8 layers, the last of them the density MLP's; the encoding enters the first and the fifth."""
        for blocks in MODELS[self.name].n_nets * [self.settings["blocks"]]:
            self.new_net([(k.WIDTH, 0, blocks), *3 * [(0, blocks, blocks)], (k.WIDTH, blocks, blocks),
                          (0, blocks, blocks), (0, blocks, 1)], True)

    def new_net(self, sizes, colored):
        """One more network, of layers of these sizes (see k.layer_forward), the density MLP and maybe the color MLP."""
        first = sum(net.n_weights for net in self.nets)
        layers, param, row, row_t, color = [], first, 0, 0, None
        for n_x, n_h, n_out in sizes:
            layers.append(types.SimpleNamespace(n_x=n_x, n_h=n_h, n_out=n_out, param=param, row=row, row_t=row_t))
            param += k.WIDTH * n_out * (n_x + k.WIDTH * n_h)
            row, row_t = row + n_out * (n_x + k.WIDTH * n_h), row_t + n_out * n_h * k.WIDTH
        density = self.new_mlp(param, k.WIDTH, 1, k.OUTPUT)
        param += k.WIDTH * density.n_rows
        if colored:
            color = self.new_mlp(param, k.OUTPUT + 6 * k.DIRECTION_FREQUENCIES + 4, 1, 3)
            param += k.WIDTH * color.n_rows
        self.nets.append(types.SimpleNamespace(
            first=first, n_weights=param - first, layers=layers, density=density, color=color,
            weight=self.new(k.row64, row), weight_t=self.new(k.row64, row_t)))

    def initialize(self, seed):
        """Random parameters: layers He uniform (bound sqrt(6 / inputs)), since there are many; MLPs as in ngp."""
        for net in self.nets:
            for layer in net.layers:
                n_in = layer.n_x + k.WIDTH * layer.n_h
                k.fill_uniform(k.WIDTH * layer.n_out * n_in, layer.param, math.sqrt(6.0 / n_in), seed, self.params)
        super().initialize(seed)


class MipNeRF(NeRF):
    """Barron et al. 2021: cones, and one network for both levels."""
    name = "mipnerf"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.wide_weight = self.new(ti.f32, self.settings["march"])


class MipNeRF360(MipNeRF):
    """Barron et al. 2022: cones in all of space, and a network for the coarse samples that is small and of density
    alone. Its buffers outlive the fine samples' forward launches: it learns after them."""
    name, endless = "mipnerf360", True

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        super().__init__(settings, space, n_photos, n_levels, training, dry)
        n, f32 = settings["march"], ti.f32
        self.proposal = types.SimpleNamespace(
            feature=self.new(k.row64, n), hidden=[self.new(k.row64, layer.n_out * n) for layer in self.nets[0].layers],
            density_hidden=self.new(k.row64, n), geometry=self.new(k.row16, n), rgb_sigma=self.new(f32, 4 * n))
        if training:
            self.proposal.grad_color_input = self.new(k.row64, n)            # 0: it has no color
            self.fine_weight, self.grad_weight = self.new(f32, n), self.new(f32, n)

    def new_nets(self):
        """The proposal network, of 4 layers, the last of them the density MLP's, and the other one."""
        blocks = self.settings["proposal"]
        self.new_net([(k.WIDTH, 0, blocks), (0, blocks, blocks), (0, blocks, 1)], False)
        super().new_nets()


class WildModel(Model):
    """Martin-Brualla et al. 2021: ngp, and a part that is another one in each photograph, and uncertain."""
    name, more_mlps, coded, code_sets = "nerfw", {"transient_net": (2 * k.OUTPUT, 2, 5)}, ("color", "transient_net"), 2

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        super().__init__(settings, space, n_photos, n_levels, training, dry)
        n = settings["march"]
        self.first_transient = self.first_code + self.n_codes    # code: a second one for each photograph
        if training:
            self.transient_input, self.transient_hidden = self.new(k.row64, n), self.new(k.row64, 2 * n)
            self.transient_raw, self.transient = self.new(k.row16, n), self.new(ti.f32, 5 * n)
            self.grad_transient_input, self.grad_transient_hidden = self.new(k.row64, n), self.new(k.row64, 2 * n)
            self.grad_transient_raw, self.grad_transient = self.new(k.row16, n), self.new(ti.f32, 5 * n)


class Nerfies(Model):
    """Park et al. 2021, "Nerfies": ngp in a canonical scene, and a warp from each photograph's moment to there."""
    name, moves, slices, decay = "nerfies", True, False, 0.992     # a cell is empty only if it is at all times
    more_mlps, coded = {"warp_net": (2 * k.OUTPUT, 3, 6)}, ("warp_net",)
    KEPT, DRAWN = (*Model.KEPT, "time", "window"), (*Model.DRAWN, "time", "window")

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        super().__init__(settings, space, n_photos, n_levels, training, dry)
        n, f32, i32 = settings["march"], ti.f32, ti.i32
        self.n_weights = k.WIDTH * (self.density.n_rows + self.color.n_rows)     # of the field; others: net_backward()
        slots, warp = self.n_slots, self.warp_net.first // k.N_FEATURES
        self.rate_shares = (slots, 0, 1.0), (warp - slots, slots, MLP_RATE), (self.n_rows - warp, warp, WARP_RATE)
        self.time, self.window = self.new(f32, max(n_photos, 1)), self.new(f32, 1)
        self.march_warp_input, self.march_seen = self.new(k.row64, n), self.new(f32, 5 * n)
        self.warp_hidden, self.warp_raw = self.new(k.row64, 3 * n), self.new(k.row16, n)
        if not training:
            return
        self.warp_input, self.seen = self.new(k.row64, n), self.new(f32, 5 * n)
        self.grad_position, self.grad_warp_raw = self.new(f32, 3 * n), self.new(k.row16, n)
        self.grad_warp_hidden, self.grad_warp_input = self.new(k.row64, 3 * n), self.new(k.row64, n)
        self.weight = self.new(f32, n)
        self.n_picked = n // 16 // 3                             # samples of the elastic loss; static points: thrice
        self.picked, self.picked_seen = self.new(f32, 15 * self.n_picked), self.new(f32, 15 * self.n_picked)
        self.picked_view, self.cell_view = self.new(i32, 3 * self.n_picked), self.new(i32, n)
        self.picked_counter = self.load(np.array([3 * self.n_picked, 3 * self.n_picked, 0, 0]))
        self.picked_weight, self.elastic = self.new(f32, self.n_picked), self.new(f32, self.n_picked)
        self.tangent_input, self.tangent_hidden = self.new(k.row64, 3 * self.n_picked), self.new(k.row64, 3 * n)
        self.tangent_raw, self.grad_tangent_raw = (self.new(k.row16, 3 * self.n_picked) for _ in range(2))
        self.each = self.load(np.arange(n))                      # point i has sample i
        self.each_span = self.load(np.stack([np.arange(n), np.ones(n, int)], 1))

    def initialize(self, seed):
        """Random parameters as in ngp, but next to no motion; codes of neighbours in time begin as neighbours, on a
        curve."""
        super().initialize(seed)
        for net in self.mlps[2:]:
            last = net.first + k.WIDTH * (net.n_rows - net.n_out)
            k.fill_uniform(k.WIDTH * net.n_out, last, 1e-3, seed, self.params)
        params, time = self.params.to_numpy().ravel(), self.time.to_numpy()
        time = (time - time.min()) / max(time.max() - time.min(), 1e-6)
        n = np.arange(1, N_CODE + 1)
        codes = np.cos(np.pi * n * time[:, None]) / n / k.CODE_SCALE
        params[self.first_code:self.first_code + codes.size] = codes.ravel()
        self.params.from_numpy(params.reshape(-1, k.N_FEATURES))
        load_weights(self)


class HyperNeRF(Nerfies):
    """Park et al. 2021, "HyperNeRF": nerfies, and ambient coordinates."""
    name, slices, coded = "hypernerf", True, ("warp_net", "slice_net")
    more_mlps = {"density": (MLPS["density"][0] + 2 + 4 * k.AMBIENT_FREQUENCIES, 1, k.OUTPUT), **Nerfies.more_mlps,
                 "slice_net": (2 * k.OUTPUT, 2, 2)}

    def __init__(self, settings, space, n_photos=0, n_levels=N_LEVELS, training=True, dry=False):
        super().__init__(settings, space, n_photos, n_levels, training, dry)
        self.slice_raw = self.new(k.row16, settings["march"])
        if training:
            self.grad_slice_raw = self.new(k.row16, settings["march"])


def load_layers(m, net):
    """Weights of a deep network into wide rows."""
    for layer in net.layers:
        k.load_layer(layer.n_x, layer.n_h, layer.n_out, layer.param, layer.row, layer.row_t, m.params, net.weight,
                     net.weight_t)


def sample_rays(m, n_rays, at, size, camera, jitter, seed, step):
    """Rays to samples: `at` is m.coarse, or m.fine after the forward launches of m.coarse. Wipes the pixels."""
    family, bent, middle = MODELS[m.name], m.space.unbounded, MODELS[m.name].middle
    n, n_fine = m.settings["coarse"], m.settings["fine"]
    k.generate_rays(n_rays, bent, m.space.near, 0.0, 0, seed, step, m.ray_pixel, m.ray_view, size, camera, m.ray,
                    m.ray_step, m.pixel, m.depth)
    k.count_even(n_rays, n if at is m.coarse else n_fine + family.merge * n, m.ray, at.span)
    scan(n_rays, m.settings["block"], m.settings["march"], at.span, m.block_start, at.counter)
    if at is m.coarse:
        k.sample_even(n_rays, n, bent, middle, jitter, seed, step, m.ray, at.span, m.ray_step, at.sample, at.sample_ray)
    else:
        k.sample_where_light_is(n_rays, n_fine, family.merge, bent, middle, jitter, seed, step, m.ray, m.coarse.span,
                                m.coarse.sample, weigh(m, n_rays), at.span, m.ray_step, at.sample, at.sample_ray)


def deep_forward(m, at, of, size, camera):
    """Samples to densities, in the buffers `of` the model or of its proposals."""
    net, counter, capacity = at.net, at.counter, m.settings["march"]
    if MODELS[m.name].cones:
        k.integrated_encode_forward(m.space.unbounded, counter, at.sample_ray, m.ray, m.ray_view, size, camera,
                                    at.sample, of.feature)
    else:
        k.frequency_encode_forward(counter, at.sample, of.feature)
    h = of.hidden[0]                                 # of which the first layer takes nothing
    for layer, y in zip(net.layers, of.hidden):
        k.layer_forward(layer.n_x, layer.n_h, layer.n_out, layer.row, capacity, counter, of.feature, h, net.weight, y)
        h = y
    mlp_forward(m, net.density, counter, h, of.density_hidden, of.geometry)
    k.density_softplus_forward(counter, of.geometry, of.rgb_sigma)


def sampled_forward(m, n_rays, at, size, camera):
    """Samples to pixels; those of proposals, which have no color, to densities alone."""
    color, counter = at.net.color, at.counter
    deep_forward(m, at, m if color else m.proposal, size, camera)
    if not color:
        return
    k.direction_input_forward(counter, m.geometry, at.sample_ray, m.ray, m.color_input)
    mlp_forward(m, color, counter, m.color_input, m.color_hidden, m.color_raw)
    k.color_head_forward(MODELS[m.name].margin, counter, m.color_raw, m.rgb_sigma)
    k.composite_forward(n_rays, at.span, at.sample, m.rgb_sigma, m.pixel, m.depth)


def sampled_backward(m, n_rays, at):
    """Mirror of sampled_forward(): from grad_pixel to grad_params."""
    net, counter = at.net, at.counter
    k.composite_backward(n_rays, at.span, at.sample, m.rgb_sigma, m.pixel, m.grad_pixel, m.grad_rgb_sigma)
    spread_backward(m, n_rays, counter, at.span, at.sample)
    k.color_head_backward(MODELS[m.name].margin, counter, m.rgb_sigma, m.grad_rgb_sigma, m.grad_color_raw)
    mlp_backward(m, net.color, net.first, counter, m.color_input, m.color_hidden, m.grad_color_raw,
                 m.grad_color_hidden, m.grad_color_input)
    deep_backward(m, at, m)


def deep_backward(m, at, of):
    """Mirror of deep_forward(): from grad_rgb_sigma and grad_color_input to grad_params."""
    net, counter, capacity = at.net, at.counter, m.settings["march"]
    last = len(net.layers) - 1
    k.density_softplus_backward(counter, of.rgb_sigma, m.grad_rgb_sigma, of.grad_color_input, m.grad_geometry)
    mlp_backward(m, net.density, net.first, counter, of.hidden[last], of.density_hidden,
                 m.grad_geometry, m.grad_density_hidden, m.grad_hidden[last])
    k.relu_backward(counter, of.hidden[last], m.grad_hidden[last])
    for l, layer in reversed(list(enumerate(net.layers))):
        before = max(l - 1, 0)
        k.layer_backward_weight(layer.n_x, layer.n_h, layer.n_out, capacity, m.settings["chunk"], m.pitch,
                                (layer.param - net.first) // k.N_FEATURES, counter, of.feature, of.hidden[before],
                                m.grad_hidden[l], m.partial)
        if l > 0:
            k.layer_backward_input(layer.n_h, layer.n_out, layer.row_t, capacity, counter, of.hidden[before],
                                   net.weight_t, m.grad_hidden[l], m.grad_hidden[before])
    sum_partials(m, net.n_weights, net.first, counter)


def sampled_step(m, n_rays, views, seed, step, learning_rate):
    """train_step() of the models that sample: the losses of the coarse and of the fine pixels are added."""
    pick(m, n_rays, views, seed)
    for at in (m.coarse, m.fine):
        sample_rays(m, n_rays, at, views.size, views.camera, 1, seed, step)
        sampled_forward(m, n_rays, at, views.size, views.camera)
        compare_pixels(m, n_rays, views, seed, step, at.counter, MODELS[m.name].coarse_loss if at is m.coarse else 1.0)
        sampled_backward(m, n_rays, at)
    adam(m, step + 1, learning_rate)


def draw_sampled_rays(m, n_rays):
    """draw_rays() of the models that sample."""
    for at in (m.coarse, m.fine):
        sample_rays(m, n_rays, at, m.view_size, m.view_camera, 0, 0, 0)
        sampled_forward(m, n_rays, at, m.view_size, m.view_camera)


def weigh(m, n_rays):
    """Weights of the coarse samples in their pixels, from their forward launches; those of cones are widened."""
    coarse, cones = m.coarse, MODELS[m.name].cones
    rgb_sigma = (m if coarse.net.color else m.proposal).rgb_sigma
    k.weigh_samples(n_rays, 0.0 if cones else 1e-5, coarse.span, coarse.sample, rgb_sigma, m.weight)
    if not cones:
        return m.weight
    k.widen_weights(n_rays, 0.01, coarse.span, m.weight, m.wide_weight)
    return m.wide_weight


def proposed_step(m, n_rays, views, seed, step, learning_rate):
    """train_step() of mip-NeRF 360: the fine pixels have a loss, and then what they found has one for the proposals."""
    coarse, fine = m.coarse, m.fine
    pick(m, n_rays, views, seed)
    for at in (coarse, fine):
        sample_rays(m, n_rays, at, views.size, views.camera, 1, seed, step)
        sampled_forward(m, n_rays, at, views.size, views.camera)
    compare_pixels(m, n_rays, views, seed, step, fine.counter)
    sampled_backward(m, n_rays, fine)
    k.weigh_samples(n_rays, 0.0, fine.span, fine.sample, m.rgb_sigma, m.fine_weight)
    k.interlevel_loss(n_rays, coarse.counter, coarse.span, coarse.sample, m.weight, fine.span, fine.sample,
                      m.fine_weight, m.grad_weight)
    k.weigh_samples_backward(n_rays, coarse.span, coarse.sample, m.proposal.rgb_sigma, m.grad_weight, m.grad_rgb_sigma)
    deep_backward(m, coarse, m.proposal)
    adam(m, step + 1, learning_rate)


def transient_forward(m, n_rays):
    """After forward(): pixels again, with the transient part."""
    counter = m.counter
    k.color_input_forward(m.n_code, m.first_transient, counter, m.geometry, m.sample_ray, m.ray, m.ray_view, m.params,
                          m.transient_input)
    mlp_forward(m, m.transient_net, counter, m.transient_input, m.transient_hidden, m.transient_raw)
    k.transient_head_forward(counter, m.transient_raw, m.transient)
    k.composite_both_forward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.transient, m.pixel)


def transient_backward(m, n_rays):
    """Mirror of transient_forward() in place of backward(): from grad_pixel, and what uncertainty_loss has put into
    grad_transient, to grad_params."""
    net, counter = m.transient_net, m.counter
    k.composite_both_backward(n_rays, m.ray_span, m.sample, m.rgb_sigma, m.transient, m.pixel, m.grad_pixel,
                              m.grad_rgb_sigma, m.grad_transient)
    spread_backward(m, n_rays, m.march_counter, m.ray_span, m.sample)
    k.transient_head_backward(counter, m.transient, m.grad_transient, m.grad_transient_raw)
    mlp_backward(m, net, m.density.first, counter, m.transient_input, m.transient_hidden,
                 m.grad_transient_raw, m.grad_transient_hidden, m.grad_transient_input)
    code_backward(m, m.n_code, m.first_transient, counter, m.sample_ray, m.ray_view, m.grad_transient_input)
    color_backward(m, m.first_code)
    k.transient_input_backward(counter, m.grad_transient_input, m.grad_color_input)
    field_backward(m)


def wild_step(m, n_rays, views, seed, step, learning_rate):
    """train_step() with the transient part."""
    pick(m, n_rays, views, seed)
    compare(m, n_rays, views, seed, step, m.first_code)
    k.mark_lit_cells(n_rays, m.settings["grid"], step, m.march_span, m.march_sample, m.march_sigma, m.lit_step)
    transient_forward(m, n_rays)
    compare_pixels(m, n_rays, views, seed, step, m.march_counter)
    k.uncertainty_loss(n_rays, TRANSIENT, m.march_counter, m.ray_span, m.sample, m.transient, m.loss, m.grad_pixel,
                       m.grad_transient)
    transient_backward(m, n_rays)
    adam(m, step + 1, learning_rate)


def warp_points(m, n, span, view, first_code, counter, x, sample, seen):
    """n points, or the samples of n rays, to the canonical scene; x: what the warp is told of them."""
    k.warp_input_forward(n, N_CODE, first_code, m.window, span, sample, view, m.params, x)
    mlp_forward(m, m.warp_net, counter, x, m.warp_hidden, m.warp_raw)
    k.warp_forward(counter, m.warp_raw, sample, seen)


def warp_march(m, n, span, view, first_code, counter):
    """What has been marched to the canonical scene, and, of many, which."""
    warp_points(m, n, span, view, first_code, counter, m.march_warp_input, m.march_sample, m.march_seen)
    if m.slices:
        mlp_forward(m, m.slice_net, counter, m.march_warp_input, m.warp_hidden, m.slice_raw)
        k.ambient_forward(MLPS["density"][0], counter, m.slice_raw, m.march_feature)


def net_backward(m, net, counter, x, products, grad_raw, owner=None, view=None):
    """Mirror of mlp_forward(): from grad_raw to grad_params. products: what the layers of what is differentiated put
    out; owner, view: whose codes it was told, if any."""
    mlp_backward(m, net, net.first, counter, x, m.warp_hidden, grad_raw, m.grad_warp_hidden, m.grad_warp_input,
                 products)
    sum_partials(m, k.WIDTH * net.n_rows, net.first, counter)
    if owner is not None:
        code_backward(m, N_CODE, m.first_code, counter, owner, view, m.grad_warp_input)


def warp_backward(m, n_rays):
    """After backward(): mirror of warp_march() for the samples that were kept."""
    k.keep_visible_samples(n_rays, m.march_span, m.march_seen, m.march_warp_input, m.march_sigma, m.ray_span, m.seen,
                           m.warp_input, m.sample_ray)
    if m.slices:
        mlp_forward(m, m.slice_net, m.counter, m.warp_input, m.warp_hidden, m.slice_raw)
        k.ambient_backward(MLPS["density"][0], m.counter, m.slice_raw, m.grad_feature, m.grad_slice_raw)
        net_backward(m, m.slice_net, m.counter, m.warp_input, m.warp_hidden, m.grad_slice_raw, m.sample_ray, m.ray_view)
    mlp_forward(m, m.warp_net, m.counter, m.warp_input, m.warp_hidden, m.warp_raw)
    k.hash_position_backward(m.n_levels, m.counter, m.level, m.sample, m.params, m.grad_feature, m.grad_position)
    k.warp_backward(m.counter, m.warp_raw, m.seen, m.grad_position, m.grad_warp_raw)
    net_backward(m, m.warp_net, m.counter, m.warp_input, m.warp_hidden, m.grad_warp_raw, m.sample_ray, m.ray_view)


def stiffen(m, n_rays, seed, step):
    """The elastic loss of some of the samples that were kept, and its gradient: through the warp's MLP, and through the
    derivatives of what it puts out, in three directions at once."""
    net, counter, x = m.warp_net, m.picked_counter, m.march_warp_input
    k.weigh_samples(n_rays, 0.0, m.ray_span, m.sample, m.rgb_sigma, m.weight)
    k.pick_kept_samples(m.n_picked, seed, step, m.counter, m.seen, m.sample_ray, m.ray_view, m.weight, m.picked,
                        m.picked_view, m.picked_weight)
    k.warp_input_forward(3 * m.n_picked, N_CODE, m.first_code, m.window, m.each_span, m.picked, m.picked_view, m.params,
                         x)
    mlp_forward(m, net, counter, x, m.warp_hidden, m.warp_raw)
    k.warp_tangent_input(m.window, counter, m.picked, m.tangent_input)
    k.mlp_tangent_forward(net.n_in, net.n_hidden, m.settings["march"], counter, m.tangent_input, m.warp_hidden,
                          net.weight, net.weight_out, m.tangent_hidden, m.tangent_raw)
    k.elastic_loss(ELASTIC, counter, m.picked, m.warp_raw, m.tangent_raw, m.picked_weight, m.elastic, m.grad_warp_raw,
                   m.grad_tangent_raw)
    net_backward(m, net, counter, x, m.warp_hidden, m.grad_warp_raw, m.each, m.picked_view)
    net_backward(m, net, counter, m.tangent_input, m.tangent_hidden, m.grad_tangent_raw)


def hold(m, points, seed, step):
    """The loss of static points that move, and its gradient."""
    n, counter, x = 3 * m.n_picked, m.picked_counter, m.march_warp_input
    k.pick_static_points(n, points.shape[0] // 3, seed, step, points, m.picked)
    k.pick_moments(n, m.n_photos, seed, step, m.picked_view)
    if m.space.unbounded:
        k.contract_samples(counter, m.picked)
    warp_points(m, n, m.each_span, m.picked_view, m.first_code, counter, x, m.picked, m.picked_seen)
    k.static_loss(STATIC, counter, m.picked, m.picked_seen, m.grad_position)
    k.warp_backward(counter, m.warp_raw, m.picked_seen, m.grad_position, m.grad_warp_raw)
    net_backward(m, m.warp_net, counter, x, m.warp_hidden, m.grad_warp_raw, m.each, m.picked_view)


def moving_step(m, n_rays, views, seed, step, learning_rate):
    """train_step() with a warp in front of the field, from coarse to fine."""
    m.window.fill(k.WARP_FREQUENCIES * min(m.progress / FINE_AT, 1.0))
    pick(m, n_rays, views, seed)
    compare(m, n_rays, views, seed, step, m.first_code)
    k.mark_lit_cells(n_rays, m.settings["grid"], step, m.march_span, m.march_seen, m.march_sigma, m.lit_step)
    backward(m, n_rays)
    warp_backward(m, n_rays)
    if ELASTIC:
        stiffen(m, n_rays, seed, step)
    if STATIC and views.points is not None:
        hold(m, views.points, seed, step)
    adam(m, step + 1, learning_rate)


def set_moment(m, time):
    """The moment that pictures of a moving scene show from now on, between those of two photographs."""
    if m.moves:
        times = m.time.to_numpy()
        order = np.argsort(times, kind="stable")
        after = int(np.clip(np.searchsorted(times[order], time), min(1, len(order) - 1), len(order) - 1))
        a, b = order[max(after - 1, 0)], order[after]
        share = float(np.clip((time - times[a]) / max(times[b] - times[a], 1e-9), 0.0, 1.0))
        k.blend_codes(N_CODE, m.first_code, int(a), int(b), share, m.n_photos, m.params)


def moments(m, n):
    """Times of n frames, from the first photograph's to the last one's; 0 for scenes that stand still."""
    times = m.time.to_numpy() if m.moves else np.zeros(1)
    return np.linspace(times.min(), times.max(), n)


# What a model is made of: its class; a training step, and the pixels of a picture, as lists of launches; the first and
# last learning rate, if not those above; what differs in MACHINES; what its file says otherwise than MODEL_INFO has it.
# Models that sample: number of networks; whether fine samples are added to coarse ones; where in its part of the ray a
# sample lies; whether it is one of a cone; by how much colors reach beyond [0, 1] (mip-NeRF's do, so that black and
# white are within reach); what the loss of coarse pixels counts. Of their settings, coarse and fine are samples a ray,
# blocks of 64 neurons a layer's width, proposal that of the proposal network, distortion the strength of that loss in
# unbounded scenes.
HASHED = dict(draw=draw_rays, rates=None, settings={}, info={})
SAMPLED = dict(step=sampled_step, draw=draw_sampled_rays, rates=(5e-3, 5e-4), coarse_loss=1.0,
               info=dict(settings=dict(coarse=(1, 1024), fine=(1, 1024), blocks=(1, 4))))
SAMPLED_CPU = dict(march=2**15, batch=2**13, frames=12, blocks=1)
SAMPLED_GPU = dict(march=2**18, batch=2**17, blocks=4)
MODELS = {name: types.SimpleNamespace(**parts) for name, parts in dict(
    ngp=dict(HASHED, make=Model, step=train_step),
    nerf=dict(SAMPLED, make=NeRF, n_nets=2, merge=1, middle=0.0, cones=False, margin=0.0,
              settings=dict(cpu=dict(SAMPLED_CPU, coarse=24, fine=24), gpu=dict(SAMPLED_GPU, coarse=64, fine=128))),
    mipnerf=dict(SAMPLED, make=MipNeRF, n_nets=1, merge=0, middle=0.5, cones=True, margin=0.001, coarse_loss=0.1,
                 settings=dict(cpu=dict(SAMPLED_CPU, coarse=32, fine=32), gpu=dict(SAMPLED_GPU, coarse=128, fine=128))),
    mipnerf360=dict(SAMPLED, make=MipNeRF360, step=proposed_step, n_nets=1, merge=0, middle=0.5, cones=True,
                    margin=0.001,
                    info=dict(settings=dict(coarse=(1, 1024), fine=(1, 1024), blocks=(1, 16), proposal=(1, 4))),
                    settings=dict(cpu=dict(SAMPLED_CPU, batch=2**11, coarse=24, fine=12, proposal=1, distortion=0.001),
                                  gpu=dict(SAMPLED_GPU, coarse=64, fine=32, proposal=4, distortion=0.001))),
    nerfw=dict(HASHED, make=WildModel, step=wild_step),
    nerfies=dict(HASHED, make=Nerfies, step=moving_step, info=dict(n_photos=(1, 2**20))),
    hypernerf=dict(HASHED, make=HyperNeRF, step=moving_step, info=dict(n_photos=(1, 2**20))),
).items()}


def make_model(name, scene, space, arch, old={}):
    """A model, by its name, for a scene, and the scene's training views on the device; `old` has settings that it must
    have. It says how much memory that takes: UserError where there is not so much."""
    make, n_photos = MODELS[name].make, count_photos(name, scene)
    if space.unbounded and not make.endless:
        raise UserError(f"--model {name} knows only scenes in a box, and this one has no end",
                        "use --model ngp or mipnerf360, or an aabb_scale of 1 in transforms.json")
    settings = {**machine_settings(name, "cpu" if arch == "cpu" else "gpu", space.unbounded), **old}
    x, y, z = space.center
    print(f"placed around ({x:.3g}, {y:.3g}, {z:.3g}): " + (
        f"a ball of radius {space.side * k.RADIUS:.3g}, and contracted what is beyond" if space.unbounded else
        f"a box with sides of {space.side:.3g}"))
    plan, images = make(settings, space, n_photos, dry=True), scene.train.pixels.nbytes / 1e6
    buffers = plan.buffer_mb() + images              # and a checkpoint on its way to the disk
    need = buffers + (48 * plan.n_rows + 4 * settings["grid"] ** 3) / 1e6 + HOST_MB
    print(f"needs {need:.0f} MB of memory, {buffers:.0f} MB of them for buffers, {images:.0f} MB of these for images")
    if arch == "cpu":
        check_fits("this run", need, "use a larger --downscale" if 2 * images > buffers else "close other programs")
    m = make(settings, space, n_photos)
    views = upload_views(m, scene.train)
    if m.moves:
        m.time.from_numpy(scene.train.time)
        if len(scene.points):
            views.points = m.load((scene.points - space.center) / space.side + 0.5)
    return m, views


# ---- Training and rendering -----------------------------------------------------------------------------------------

def read_totals(m):
    """[3] u32, wrapping around: rays dropped, samples marched, samples kept since the model was made."""
    return np.concatenate([m.march_counter.to_numpy()[2:], m.counter.to_numpy()[3:]]).view(np.uint32)


def train(m, views, seed, steps=None, seconds=None, report=lambda **line: None, keep=lambda state: False, resume=None,
          read_every=None):
    """Train for a number of steps, or for so many seconds of wall clock; the learning rate's schedule spans either.

    views   from upload_views
    report  called every `read_every` steps (default: READ_EVERY), after some of the first and at the end, with progress
            (0..1), step, seconds, loss, psnr, samples_per_second, n_rays
    keep    called then with the state of this loop, a dict of numbers, while the clock stands still: this and the
            model's buffers in KEPT are what a checkpoint needs. Training ends early if it returns True. Meanwhile, it
            may launch what rendering launches and nothing else: see glance()
    resume  (state, arrays) that were kept, to go on from there
    Returns the totals: steps, complete, train_seconds, compile_seconds, samples, rays, rays_dropped.
    The clock starts when every kernel has been launched once on nothing.
    """
    grid, batch, refresh = m.settings["grid"], m.settings["batch"], m.settings["refresh"]
    take_step, (first_rate, last_rate) = MODELS[m.name].step, MODELS[m.name].rates or (LEARNING_RATE, FINAL_RATE)
    start = time.perf_counter()
    m.initialize(seed)
    replay(take_step, m, 0, views, seed, 0, 0.0)
    if m.marches:
        view_bound = m.new(ti.f32, 4 * views.n)
        replay(update_occupancy, m, 0, 0, seed, 0)
        start_occupancy(m, types.SimpleNamespace(**{**vars(views), "n": 0}), view_bound)
    now = types.SimpleNamespace(step=0, progress=0.0, seconds=0.0, cell=0, n_rays=min(256, m.settings["rays"]),
                                samples=0, rays=0, rays_dropped=0)
    if resume:
        vars(now).update(resume[0], n_rays=min(resume[0]["n_rays"], m.settings["rays"]))
        for name in m.KEPT:
            getattr(m, name).from_numpy(resume[1][name])
        load_weights(m)
        if m.marches:
            list_live(m, views)
    m.bad_step.fill(k.NEVER)
    ti.sync()
    compile_seconds = time.perf_counter() - start

    rays_since, seen, stop = 0, read_totals(m), False
    start = time.perf_counter() - now.seconds
    if m.marches and not resume:
        start_occupancy(m, views, view_bound)
    if m.marches and m.live_counter.to_numpy()[0] == 0:
        raise UserError("there is nothing to learn: no camera sees any of the scene's box, or all of it is transparent",
                        "are the poses right, and is alpha 0 only where nothing is?")
    while now.progress < 1.0 and not stop:
        rate, m.progress = first_rate * (last_rate / first_rate) ** now.progress, now.progress
        rate *= min(1.0, (1.0 - now.progress) / COOL_DOWN)
        turn, first_view = divmod(now.rays + now.rays_dropped + rays_since, views.n)
        m.next_view = turn % 2**31, first_view
        replay(take_step, m, now.n_rays, views, seed, now.step, rate)
        now.step, rays_since = now.step + 1, rays_since + now.n_rays
        if m.marches and now.step % min(refresh, 1 + now.step // 64) == 0:   # more often while the field takes shape
            n_cells = min(batch, grid**3)
            replay(update_occupancy, m, n_cells, now.cell, seed, now.step)
            now.cell = (now.cell + n_cells) % LAST_CELL
        now.progress = now.step / steps if steps is not None else (time.perf_counter() - start) / seconds
        if now.step % (read_every or READ_EVERY) == 0 or now.step in (1, 2, 4, 8) or now.progress >= 1.0:
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
            paused, rays_since = time.perf_counter(), 0
            stop = keep(dict(vars(now)))
            seen = read_totals(m)
            start += time.perf_counter() - paused
    if m.marches:
        pack_occupancy(m, now.step, k.END)                       # nothing is dark: new views may see it
    set_moment(m, 0.0)                                           # whatever pictures were looked at meanwhile
    ti.sync()
    return dict(steps=now.step, complete=now.progress >= 1.0, train_seconds=time.perf_counter() - start,
                compile_seconds=compile_seconds, samples=now.samples, rays=now.rays, rays_dropped=now.rays_dropped)


def aim(m, camera, width, height, lens=0):
    """Make a camera the one that start_tile is for: [22] in world units, see k.generate_rays; lens 0 or 1, see
    k.lens_direction."""
    m.view_camera.from_numpy(to_cube(camera[None], m.space).ravel())
    m.view_size.from_numpy(np.array([0, width, height, lens], np.int32))


def start_tile(m, n_rays, first):
    """Rays through the pixels of a picture, from the `first` on."""
    step_length, _ = step_size(m, m.settings["render_steps"])
    k.list_pixels(n_rays, first, m.ray_pixel, m.ray_view, m.ray_code)
    k.generate_rays(n_rays, m.space.unbounded, m.space.near, step_length, 0, 0, 0, m.ray_pixel, m.ray_view, m.view_size,
                    m.view_camera, m.ray, m.ray_step, m.pixel, m.depth)


def render_tiles(m, camera, width, height, lens=0):
    """Render one view, tile by tile, each of as many rays as there are buffers for: yields (rgb [n, 3] over white,
    depth [n] in world units, inf where empty). camera and lens: see aim()."""
    n_pixels, tile = width * height, min(m.settings["rays"], m.settings["march"] // 8)
    aim(m, camera, width, height, lens)
    for first in range(0, n_pixels, tile):
        n_rays = min(tile, n_pixels - first)
        start_tile(m, n_rays, first)
        MODELS[m.name].draw(m, n_rays)
        pixel = m.pixel.to_numpy()[:4 * n_rays].reshape(n_rays, 4)
        opacity = 1.0 - pixel[:, 3]
        depth = np.where(opacity > 0.5, m.depth.to_numpy()[:n_rays] / np.maximum(opacity, 0.5), np.inf)
        yield pixel[:, :3] + pixel[:, 3:], depth * m.space.side


def render_view(m, camera, width, height, lens=0):
    """All of render_tiles: (rgb [height, width, 3], depth [height, width])."""
    rgb, depth = zip(*render_tiles(m, camera, width, height, lens))
    return np.concatenate(rgb).reshape(height, width, 3), np.concatenate(depth).reshape(height, width)


@contextlib.contextmanager
def glance(m):
    """While training pauses, a model to render from, as train() leaves it in the end; without a trace in what is to
    come."""
    if m.marches:
        occupancy = m.occupancy.to_numpy()
        seen = occupancy.copy()
        seen[-m.settings["grid"] ** 3 // 32 - 6:-6] = 0          # no cell is dark
        m.occupancy.from_numpy(seen)
    yield
    if m.marches:
        m.occupancy.from_numpy(occupancy)


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


def evaluate(m, views, out=None):
    """Render every view and compare: psnr, ssim, psnr_per_view, render_seconds_per_view. Pixels that a mask leaves out
    do not count; of SSIM's image they are those of the truth. ssim is None where all views are too small for it. With
    `out`, the pictures are left there: test/*.png, compare.png (truth | render | error, three views) and depth.png."""
    n, psnrs, ssims, rows, seconds = len(views.size), [], [], [], 0.0
    if out is not None:
        shutil.rmtree(os.path.join(out, "test"), ignore_errors=True)         # of a run that this one overwrites
        os.makedirs(os.path.join(out, "test"), exist_ok=True)
    with progress_bar("test", n) as show:
        for i, (_, width, height, lens) in enumerate(views.size):
            start = time.perf_counter()
            set_moment(m, views.time[i])
            rgb, depth = render_view(m, views.camera[i], width, height, lens)
            seconds += time.perf_counter() - start
            rgba = view_image(views, i)
            truth, counts = over_white(rgba), (rgba[..., 3:] == 255) | (views.alpha != "mask")
            psnrs.append(psnr(rgb, truth, counts))
            ssims += [ssim(np.where(counts, rgb, truth), truth)] if min(width, height) >= 11 else []
            if out is not None:
                imageio.imwrite(os.path.join(out, "test", f"{i:03d}.png"), to_bytes(rgb))
                if i in (0, n // 3, 2 * n // 3) and tuple(views.size[i, 1:3]) == tuple(views.size[0, 1:3]):
                    rows.append(np.concatenate([truth, np.clip(rgb, 0, 1), np.abs(np.clip(rgb, 0, 1) - truth)], 1))
                if i == 0:
                    imageio.imwrite(os.path.join(out, "depth.png"), depth_image(depth, *depth_range(depth)))
            show(i + 1)
    if out is not None:
        imageio.imwrite(os.path.join(out, "compare.png"), to_bytes(np.concatenate(rows)))
    return dict(psnr=float(np.mean(psnrs)), ssim=float(np.mean(ssims)) if ssims else None, psnr_per_view=psnrs,
                render_seconds_per_view=seconds / n)


def evaluate_fitted(m, views, n_steps=50, n_rays=512):
    """PSNR of the right half of each view when its code has been learned from its left half, everything else as it is
    (NeRF in the Wild, section 5): what is left is not exposure or white balance. The mean over the views that masks
    leave something of there; None if there are none."""
    neutral, psnrs, rng = neutral_code(m), [], np.random.default_rng(0)
    ray_pixel, params = np.zeros(m.settings["rays"], np.int32), m.params.to_numpy()
    with progress_bar("fit", len(views.size)) as show:
        for i, (_, width, height, lens) in enumerate(views.size):
            view = select_views(views, np.arange(len(views.size)) == i)
            on_device, n = upload_views(m, view), min(n_rays, m.settings["rays"])
            m.moment.fill(0.0)
            m.grad_params.fill(0.0)                              # the table gets none here, nor is it cleared
            for step in range(n_steps):
                k.list_pixels(n, 0, m.ray_pixel, m.ray_view, m.ray_code)
                ray_pixel[:n] = rng.integers(0, height, n) * width + rng.integers(0, max(width // 2, 1), n)
                m.ray_pixel.from_numpy(ray_pixel)
                compare(m, n, on_device, 0, step, neutral)
                k.composite_backward(n, m.ray_span, m.sample, m.rgb_sigma, m.pixel, m.grad_pixel, m.grad_rgb_sigma)
                color_backward(m, neutral)
                adam(m, step + 1, 10.0 * LEARNING_RATE)          # codes are small numbers: see k.CODE_SCALE
            rgb, _ = render_view(m, views.camera[i], width, height, lens)
            rgba, right = view_image(views, i), np.arange(width)[:, None] >= width // 2
            counts = right & ((rgba[..., 3:] == 255) | (views.alpha != "mask"))
            psnrs += [psnr(rgb, over_white(rgba), counts)] if counts.any() else []
            m.params.from_numpy(params)
            show(i + 1)
    return float(np.mean(psnrs)) if psnrs else None


# ---- Files: the model, pictures, the video --------------------------------------------------------------------------

FORMAT = 4                      # of model.npz and checkpoint.npz
FILE_LIMIT = 2**30              # bytes that such a file may have; reading it takes at most twice as many

# What their info has to say, see believe(); it may come from anyone.
POWERS = {2**i for i in range(4, 25)}
MODEL_INFO = dict(
    scene=str, downscale=(1, 10**9), width=(1, 2**15), height=(1, 2**15), n_levels=(1, N_LEVELS), n_photos=(0, 2**20),
    space=dict(center=3 * [(-1e12, 1e12)], side=(1e-12, 1e12), unbounded=(0, 1), near=(0.0, 1e3)),
    settings=dict(coarsest=(1, 2**16), finest=(1, 2**16), table=POWERS, color_layers=(1, 2),
                  grid=POWERS & set(range(16, 513)), train_steps=(1, 2**14), render_steps=(1, 2**14)))
CHECKPOINT_INFO = dict(
    MODEL_INFO, seed=(-2**31, 2**31 - 1), views=(0, 2**32), arch={"cpu", "cuda", "vulkan", "metal"}, target=(1e-9, 1e9),
    unit={"steps", "seconds"}, state=dict(
        step=(1, 10**9), progress=(0.0, 1e9), seconds=(0.0, 1e9), cell=(0, LAST_CELL - 1), n_rays=(1, 2**31 - 1),
        samples=(0, 2**62), rays=(0, 2**62), rays_dropped=(0, 2**62)))


@contextlib.contextmanager
def replacing(path):
    """The name of a file to write, which takes the place of `path` once it is complete and on the disk. Should that
    fail, `path` is what it was: UserError."""
    part = "{}.part{}".format(*os.path.splitext(path))
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        for pause in (0.1, 0.5, 2.0, None):          # on Windows, who looks at the old one keeps it where it is
            try:
                os.replace(part, path)
                break
            except PermissionError:
                if pause is None:
                    raise
                time.sleep(pause)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(part)
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
    with replacing(path) as part:
        np.savez(part, info=np.array(json.dumps(dict(info, format=FORMAT))), **arrays)


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
        sound = is_line(x)
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
        folder = os.path.dirname(path)
        killed = os.path.exists(os.path.join(folder, "checkpoint.npz"))
        raise UserError(f"no {path}", f"'train --resume {folder}' goes on with that run and leaves one" if killed else
                        "give the folder of a training run, such as runs/lego")
    with refusing(f"{path} is not usable", "copy it again, or train again with this version"):
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
                              occupancy=(b"<u4", cells // 2048 * 129 + 6), time=(b"<f4", max(info["n_photos"], 1)),
                              window=(b"<f4", 1), camera_train=(b"<f4", None, k.CAMERA),
                              camera_test=(b"<f4", None, k.CAMERA), camera_test_size=(b"<i4", None, 4),
                              camera_test_time=(b"<f4", None))
                wanted = m.KEPT if training else [*m.DRAWN, "camera_train", "camera_test", "camera_test_size",
                                                  *(["camera_test_time"] if m.moves else [])]
                shapes = {name: shapes[name] for name in wanted}
                if sorted(file.namelist()) != sorted(name + ".npy" for name in ["info", *shapes]):
                    raise ValueError("it holds other arrays")
                return info, {name: read_member(file, name, *shape) for name, shape in shapes.items()}


def save_model(path, m, info, cameras):
    """Write all that rendering needs to an .npz: the buffers in m.DRAWN, info and cameras (a dict of arrays [n, 22] in
    world units, and of the test views' size [n, 4], and time [n] if things move; stored as camera_<name>)."""
    save_arrays(path, info, **{name: getattr(m, name).to_numpy() for name in m.DRAWN},
                **{f"camera_{name}": camera for name, camera in cameras.items()})


def check_cameras(cameras, space):
    """ValueError if the cameras of a model, see save_model, are not sound."""
    size, sound = cameras["test_size"], True
    for camera in (cameras["train"], cameras["test"]):
        pose = to_cube(camera, space)[:, :12].reshape(-1, 3, 4)
        turned = pose[:, :, :3] @ pose[:, :, :3].transpose(0, 2, 1)
        sound = (sound and len(pose) and np.abs(pose).max() < 1e6 and np.abs(turned - np.eye(3)).max() < 0.1
                 and np.abs(camera).max() < 1e9 and camera[:, 12:14].min() > 1e-6)
    if not (sound and len(size) == len(pose) and 1 <= size[:, 1:3].min() <= size[:, 1:3].max() <= 2**15):
        raise ValueError("it has cameras that cannot be")


def load_model(folder, machine, training=False):
    """The model of a run folder, ready to render on this machine ("cpu" or "gpu"): (Model, info, cameras)."""
    path = os.path.join(folder, "model.npz")
    info, arrays = read_arrays(path, machine)
    space, cameras = types.SimpleNamespace(**info["space"]), {n[7:]: a for n, a in arrays.items() if n[:7] == "camera_"}
    with refusing(f"{path} is not usable", "copy it again, or train again"):
        check_cameras(cameras, space)
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


def depth_range(depth):
    """(near, far) of most of what is seen in a depth picture."""
    seen = depth[np.isfinite(depth)]
    return np.percentile(seen, (1, 99)) if seen.size else (0.0, 1.0)


def depth_image(depth, near, far):
    """Depth [height, width] as a grey picture u8: near is white, far dark grey, empty black."""
    grey = 1.0 - 0.85 * np.clip((depth - near) / max(far - near, 1e-6), 0.0, 1.0)
    return to_bytes(np.where(np.isfinite(depth), grey, 0.0))


def nearest_to_axes(cameras):
    """The point [3] nearest to the optical axes of cameras [n, 22]: what they look at. Where these are next to parallel
    that is noise, perhaps behind the cameras, and a point in front of them stands in for it."""
    pose = cameras[:, :12].reshape(-1, 3, 4).astype(np.float64)
    origin, forward = pose[:, :, 3], -pose[:, :, 2]
    # sum_n (I - f f^T) (x - origin_n) = 0. A little of the identity keeps it solvable when all axes are parallel.
    across = np.eye(3) - forward[:, :, None] * forward[:, None, :]
    middle, look = origin.mean(0), forward.mean(0)
    point = np.linalg.solve(across.sum(0) + 1e-6 * np.eye(3), (across @ origin[:, :, None]).sum(0)[:, 0]
                            + 1e-6 * (middle + look))
    reach = np.linalg.norm(origin - middle, axis=1).max()
    if np.linalg.norm(look) > 0.8 and (point - middle) @ look < 0.5 * reach:
        point = middle + 3.0 * reach * look / np.linalg.norm(look)
    return point


def look_at(at, target, up):
    """Camera-to-world matrix, [12] row by row, of a camera at a point that looks at another."""
    back = (at - target) / np.linalg.norm(at - target)
    right = np.cross(up, back)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, at], 1).ravel()


def camera_frame(cameras):
    """(origins [n, 3], target, right, up, forward) of cameras [n, 22]: the point they look at, see nearest_to_axes, and
    orthonormal axes of their mean orientation; forward [3] is a mean, and short where they look every way."""
    pose = cameras[:, :12].reshape(-1, 3, 4).astype(np.float64)
    up, forward = pose[:, :, 1].mean(0), -pose[:, :, 2].mean(0)
    up = pose[0, :, 1] if np.linalg.norm(up) < 0.1 else up       # they cancel where half of them are upside down
    up = up / np.linalg.norm(up)
    right = np.cross(forward, up)
    if np.linalg.norm(right) < 1e-6:
        right = np.cross([1.0, 0.0, 0.0] if abs(up[0]) < 0.9 else [0.0, 1.0, 0.0], up)
    return pose[:, :, 3], nearest_to_axes(cameras), right / np.linalg.norm(right), up, forward


def camera_path(cameras, places, target, up):
    """Cameras [n, 22] like the first of `cameras`, but at places [n, 3], without distortion, looking at the target."""
    path = np.repeat(cameras[:1], len(places), 0)
    path[:, 16:] = 0.0
    path[:, :12] = [look_at(at, target, up) for at in places]
    return path


def orbit_cameras(cameras, n_frames):
    """A closed path [n_frames, 22] fitted to the training cameras [n, 22], in world units; without distortion.

    Where they surround a subject, a circle around it at their mean distance and height, or, where they leave out a
    quarter of it and more, back and forth over the rest; where they face it from one side, an ellipse as wide as they
    are spread, in the plane in which they lie. Every frame looks at the point that is nearest to all their optical
    axes.
    """
    origin, target, right, up, forward = camera_frame(cameras)
    turn = np.linspace(0.0, 2.0 * np.pi, n_frames, endpoint=False)[:, None]
    if np.linalg.norm(forward) > 0.8:                # 1: all look the same way; 0: from all around
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
    return camera_path(cameras, place, target, up)


def spiral_cameras(cameras, n_frames):
    """A closed path [n_frames, 22] for cameras that face their subject, as Mildenhall et al. 2019 ("Local Light Field
    Fusion") show it: twice around their mean place and once towards the subject and back, as far as they are spread,
    looking at what they look at."""
    origin, target, right, up, forward = camera_frame(cameras)
    turn = np.linspace(0.0, 4.0 * np.pi, n_frames, endpoint=False)[:, None]
    axes = np.stack([right, up, np.cross(up, right)])            # the last one away from the subject, as near as not
    spread = np.percentile(abs((origin - origin.mean(0)) @ axes.T), 90, axis=0)
    moves = np.concatenate([np.cos(turn), np.sin(turn), np.sin(0.5 * turn)], 1)
    return camera_path(cameras, origin.mean(0) + (moves * spread) @ axes, target, up)


def read_path(path, size):
    """Cameras [n, 22] and sizes [(width, height, lens)] of a file of camera poses: what transforms.json has, or the
    camera path that nerfstudio's viewer saves. size: for frames that name none. UserError."""
    meta = read_json(path)
    with refusing(f"{path} is not usable", "see 'render' in README.md for what it may hold"):
        if "camera_path" in meta:                    # vertical angles in degrees
            if meta.get("camera_type", "perspective") != "perspective":
                raise ValueError(f"camera_type {meta['camera_type']!r:.40} is not 'perspective'")
            size = meta.get("render_width", size[0]), meta.get("render_height", size[1])
            meta = dict(frames=[dict(transform_matrix=np.reshape(frame["camera_to_world"], (4, 4)), w=size[0],
                                     h=size[1], camera_angle_y=math.radians(frame["fov"]))
                                for frame in meta["camera_path"]])
        frames = [parse_frame({"file_path": str(i), **meta}, frame) for i, frame in enumerate(meta["frames"])]
        sizes = [(round(f.w or size[0]), round(f.h or size[1]), int(f.fisheye)) for f in frames]
        if not frames or not all(is_pose(frame.pose) for frame in frames):
            raise ValueError("there are no frames, or a pose is not finite, or no rotation")
        if not 1 <= np.min(sizes, 0)[:2].min() <= np.max(sizes) <= 2**15:
            raise ValueError("images have 1 to 32768 pixels a side")
        return np.array([frame_camera(f, *size[:2]) for f, size in zip(frames, sizes)], np.float32), sizes


def resize_camera(camera, old_size, new_size):
    """Camera [22] for another image size (width, height): the same field of view across."""
    camera, scale = camera.copy(), new_size[0] / old_size[0]
    camera[12:16] *= scale
    camera[15] += 0.5 * (new_size[1] - scale * old_size[1])
    return camera


def nice_ticks(low, high):
    """About five round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step


def draw_history(path, rows):
    """A picture of log.csv's rows: PSNR of the training rays and their loss against time, and their running mean."""
    if not rows:                                     # somebody has removed what was there
        return
    seconds, loss, decibel = np.array([row.strip().split(",")[1:] for row in rows], np.float64).T
    loss = np.log10(np.maximum(loss, 1e-10))
    image = PIL.Image.new("RGB", (960, 480), "white")
    draw, font = PIL.ImageDraw.Draw(image), PIL.ImageFont.load_default(16)
    for left, title, value in ((70, "PSNR of training rays, dB", decibel), (550, "their loss, log10", loss)):
        right, top, bottom = left + 380, 50, 420
        middle = np.convolve(np.pad(value, 8, "edge"), np.ones(17) / 17, "valid")
        low, high = np.percentile(value, (2, 100))
        high, end = max(high, low + 0.1), max(seconds[-1], 0.1)

        def at(t, y):
            share = np.clip((y - low) / (high - low), 0.0, 1.0)
            return left + (right - left) * t / end, bottom - (bottom - top) * share

        for tick in nice_ticks(0.0, end):
            x, _ = at(tick, low)
            draw.line([x, top, x, bottom + 5], "gainsboro")
            draw.text((x, bottom + 8), f"{tick:g}", "black", font, "ma")
        for tick in nice_ticks(low, high):
            _, y = at(0.0, tick)
            draw.line([left - 5, y, right, y], "gainsboro")
            draw.text((left - 8, y), f"{tick:g}", "black", font, "rm")
        draw.line([left, top, left, bottom, right, bottom], "black")
        draw.text((left, top - 26), title, "black", font)
        draw.text(((left + right) / 2, bottom + 30), "seconds of training", "black", font, "ma")
        for values, color, width in ((value, "lightskyblue", 1), (middle, "navy", 3)):
            draw.line([coordinate for point in zip(*at(seconds, values)) for coordinate in point], color, width)
    with replacing(path) as part:
        image.save(part)


def write_frames(path, frames, n_frames):
    """Frames (an iterable of u8 images) as a video file, or as PNGs in a folder if the name has no ending.

    Without ffmpeg a .gif stands in for .mp4. Returns the path written.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in ("", ".mp4", ".gif"):
        raise UserError(f"cannot write a video as {path}", "end the name in .mp4 or .gif, or give a folder for PNGs")
    if ending == "" and os.path.exists(os.path.join(path, f"{n_frames:04d}.png")):
        raise UserError(f"{path} has frames of a longer video", "remove them, or choose another --out")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with progress_bar("render", n_frames) as show:
        if ending == "":
            os.makedirs(path, exist_ok=True)
            for i, frame in enumerate(frames):
                imageio.imwrite(os.path.join(path, f"{i:04d}.png"), frame)
                show(i + 1)
            return path
        if ending == ".mp4":
            try:
                import imageio_ffmpeg
                imageio_ffmpeg.get_ffmpeg_exe()
            except (ImportError, RuntimeError):
                path, ending = path[:-4] + ".gif", ".gif"
                print(f"no ffmpeg here: writing {path} instead (pip install 'imageio[ffmpeg]' brings it)")

        def even():
            """One frame at a time, with even sizes, as H.264 wants them."""
            for i, frame in enumerate(frames):
                height, width = frame.shape[:2]
                yield np.pad(frame, [(0, height % 2), (0, width % 2)] + [(0, 0)] * (frame.ndim - 2), "edge")
                show(i + 1)
        with replacing(path) as part:
            if ending == ".gif":
                imageio.imwrite(part, list(even()), duration=1000 / 24, loop=0)
            else:
                imageio.imwrite(part, even(), is_batch=True, fps=24, codec="libx264", quality=8, macro_block_size=2,
                                plugin="FFMPEG")
                with contextlib.suppress(RuntimeError):          # ffmpeg's exit code is not to be had: is it all there?
                    n_frames -= imageio_ffmpeg.count_frames_and_secs(part)[0]
                if n_frames:
                    raise UserError(f"cannot write {path}", "check the free space; an older file there is intact")
    return path


# ---- Command line ---------------------------------------------------------------------------------------------------

def machine_settings(name, machine, unbounded=0):
    """The settings of a model on a machine."""
    return {**MACHINES[machine], **MODELS[name].settings.get(machine, {}), **(UNBOUNDED[machine] if unbounded else {})}


def count_photos(name, scene):
    """How many photographs get codes."""
    make = MODELS[name].make
    return len(scene.train.size) if scene.capture or make is WildModel or make.moves else 0


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
        options = dict(real_matrix_scalarize=choice != "cpu", unrolling_limit=0, cpu_max_num_threads=count_cores())
        sys.stdout.flush()
        with tempfile.TemporaryFile("w+") as log:    # only Taichi's trace says which device it found
            saved = os.dup(1), os.dup(2)
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                with pinned_threads():
                    ti.init(arch=getattr(ti, choice), enable_fallback=False, log_level=ti.TRACE, **options)
                trouble = None
            except RuntimeError as error:
                trouble = error
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
        if not trouble and not (arch == "auto" and choice == "vulkan" and (in_software or device == "unknown")):
            return choice, cpu_name() if choice == "cpu" else device
    if arch == "auto":
        raise UserError(f"Taichi cannot start: {one_line(trouble)}", "README.md says on which systems it can")
    raise UserError(f"--arch {arch} is not to be had on this machine", "--arch auto takes the best that there is")


@contextlib.contextmanager
def pinned_threads():
    """Threads that are started meanwhile are dealt out to the cores, for good, where that can be done (Linux):
    Taichi's, one a core, wake up for each kernel, and left alone, at times for seconds, all do so on one core."""
    def threads():
        return set(map(int, os.listdir("/proc/self/task"))) if os.path.isdir("/proc/self/task") else set()
    before = threads()
    yield
    for i, thread in enumerate(sorted(threads() - before)):
        cores = sorted(os.sched_getaffinity(0))
        with contextlib.suppress(OSError):           # one that has ended since, or a system that forbids it
            os.sched_setaffinity(thread, {cores[i % len(cores)]})


def count_cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name():
    """What the operating system calls the processor, and the number of cores."""
    name = platform.processor() or platform.machine() or "unknown"
    with contextlib.suppress(OSError, AttributeError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = re.search(r"model name\s*: (.*)", file.read()).group(1)
    return f"{name}, {count_cores()} cores"


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


@contextlib.contextmanager
def progress_bar(text, total, wait=10.0):
    """A function to show how much of a total is done, with a note: a rich progress bar, or where the output is not a
    terminal a line every 10 seconds, the first after `wait`."""
    columns = (rich.progress.TextColumn(f"{text:6}"), rich.progress.BarColumn(), rich.progress.TaskProgressColumn(),
               rich.progress.TextColumn("{task.fields[note]}"), rich.progress.TimeRemainingColumn())
    due = time.monotonic() + wait
    with rich.progress.Progress(*columns, disable=not sys.stdout.isatty(), transient=True) as bar:
        task = bar.add_task(text, total=total, note="")

        def show(done, note=""):
            nonlocal due
            bar.update(task, completed=done, note=note)
            if bar.disable and time.monotonic() >= due:
                due = time.monotonic() + 10.0
                print(note or f"{text}: {done} of {total}", flush=True)
        yield show


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
    moved = f"where has it moved? train SCENE --resume {out} takes it from there" if resume else None
    scene = load_scene(args.scene, args.downscale, moved)
    space, (_, width, height, _) = place_scene(scene), scene.train.size[0]
    for line in scene.skipped:
        print(f"{args.scene}: {line}")
    print(f"{args.scene}: {len(scene.train.size)} training views, {len(scene.test.size)} held out ({scene.split}), "
          f"{width}x{height}, read in {time.perf_counter() - start:.1f} s")
    n_photos = count_photos(args.model, scene)
    checksum = zlib.crc32(scene.train.camera[:, :12].tobytes(), zlib.crc32(scene.train.size.tobytes()))
    if resume:
        if (n_photos, checksum) != (old["n_photos"], old["views"]):
            raise UserError(f"{args.scene} is not what {out} is trained on: it has other views, poses or sizes",
                            moved)
        space = types.SimpleNamespace(**old["space"])
    arch, device = start_taichi(args.arch)
    print(f"tinynerf {VERSION} on {arch} ({device}), Taichi {'.'.join(map(str, ti.__version__))}")
    m, views = make_model(args.model, scene, space, arch, old.get("settings", {}))
    settings = m.settings
    target, unit = (old["target"], old["unit"]) if old else next(
        (source[unit], unit) for source in (vars(args), settings) for unit in ("steps", "seconds") if source.get(unit))
    info = dict(version=VERSION, model=m.name, scene=os.path.abspath(args.scene), downscale=args.downscale,
                n_levels=m.n_levels, n_photos=m.n_photos, space=vars(space), width=int(width), height=int(height),
                split=scene.split,
                settings={name: settings[name] for name in {**MODEL_INFO, **MODELS[m.name].info}["settings"]})
    cameras = dict(train=scene.train.camera, test=scene.test.camera, test_size=scene.test.size,
                   **(dict(test_time=scene.test.time) if m.moves else {}))
    with refusing("no model of this scene could be read again",
                  "give its folder a plain name, images at most 32768 pixels a side, and poses in sensible units"):
        believe(info, {**MODEL_INFO, **MODELS[m.name].info})
        check_cameras(cameras, space)

    interrupted = []                                 # by Ctrl-C, the first of which is only noted

    def interrupt(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if not resume:                                   # the one there was may be that of another run by now
        out = run_folder(args.out, args.scene, args.overwrite)
    with refusing(f"cannot make {out}", "has another run just made it? choose another --out"):
        os.makedirs(out, exist_ok=bool(resume or args.out and args.overwrite))
    log_path, rows = os.path.join(out, "log.csv"), ["step,seconds,loss,psnr\r\n"]
    if resume and os.path.exists(log_path):          # go on behind the checkpoint's row; a killed run went further
        with open(log_path, newline="", encoding="utf-8", errors="replace") as file:
            found = ((row, re.fullmatch(r"(\d{1,9}),\d+\.\d+,\d+(\.\d+)?(e-\d+)?,-?\d+\.\d+\r\n", row)) for row in file)
            rows += [row for row, match in found if match and int(match[1]) <= old["state"]["step"]]
    with progress_bar("train", 1.0, wait=0.0) as show:
        saved, watched = [time.monotonic()], [0.0]

        def report(progress, step, seconds, loss, psnr, samples_per_second, n_rays):
            rows.append(f"{step},{seconds:.3f},{loss:.6g},{psnr:.3f}\r\n")
            show(progress, f"step {step}  psnr {psnr:5.2f} dB  {samples_per_second / 1e6:.2f} M samples/s  "
                           f"{seconds:.0f} s")

        def keep(state):
            """A checkpoint after the first step, now and then, and at the end."""
            if (state["step"] == 1 or time.monotonic() > saved[0] + CHECKPOINT_SECONDS or interrupted
                    or state["progress"] >= 1.0):
                kept = {name: getattr(m, name).to_numpy() for name in m.KEPT}
                if not all(np.isfinite(array).all() for array in kept.values()):
                    raise UserError(f"the model is not finite at step {state['step']}: training has stopped",
                                    "are the poses and images right? the last checkpoint is from before that step")
                with replacing(log_path) as part:
                    pathlib.Path(part).write_bytes("".join(rows).encode())
                save_arrays(os.path.join(out, "checkpoint.npz"), dict(
                    info, seed=args.seed, views=checksum, target=target, unit=unit, arch=arch, state=state), **kept)
                saved[0] = time.monotonic()
                if state["step"] == 1:               # what there is of an older run is not this one's
                    for name in ("model.npz", "metrics.json"):
                        with contextlib.suppress(OSError):
                            os.remove(os.path.join(out, name))
            if args.watch and time.monotonic() > watched[0] + WATCH_SECONDS:
                _, *size, lens = scene.test.size[0]
                small = [max(side // max(1, round(size[0] / 200)), 1) for side in size]
                set_moment(m, scene.test.time[0])    # no step looks at what this writes
                with glance(m):
                    rgb, _ = render_view(m, resize_camera(scene.test.camera[0], size, small), *small, lens)
                with contextlib.suppress(UserError), replacing(os.path.join(out, "live.png")) as part:
                    imageio.imwrite(part, to_bytes(rgb))         # a viewer that does not let go of it must not end this
                watched[0] = time.monotonic()
            return bool(interrupted)

        signal.signal(signal.SIGINT, interrupt)
        try:
            total = train(m, views, args.seed, **{unit: target}, report=report, keep=keep, resume=resume)
        except BaseException:                        # before its first checkpoint a run leaves nothing behind
            with contextlib.suppress(OSError):       # there is something in it, or it is gone
                os.rmdir(out)
            raise
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if not total["complete"]:
        print(f"interrupted at step {total['steps']}: 'train --resume {out}' goes on; the result so far follows")
    save_model(os.path.join(out, "model.npz"), m, info, cameras)

    draw_history(os.path.join(out, "history.png"), rows[1:])
    buffer_mb = m.buffer_mb()
    metrics = measure(m, scene.test, out)
    metrics.update(buffer_mb=buffer_mb, split=scene.split, steps=total["steps"], train_seconds=total["train_seconds"],
                   compile_seconds=total["compile_seconds"],
                   samples_per_second=total["samples"] / total["train_seconds"],
                   rays_per_second=total["rays"] / total["train_seconds"], rays_dropped=total["rays_dropped"])
    metrics.update(peak_memory_mb=peak_memory_mb(), arch=arch, device=device, seed=args.seed,
                   taichi=".".join(map(str, ti.__version__)), version=VERSION)
    with replacing(os.path.join(out, "metrics.json")) as part:   # before the video, which may fail
        pathlib.Path(part).write_bytes(json.dumps(metrics, indent=1).encode())
    path = orbit_cameras(scene.train.camera, settings["frames"])

    def frames():
        for camera, moment in zip(path, moments(m, len(path))):
            set_moment(m, moment)
            yield to_bytes(render_view(m, camera, width, height)[0])
    write_frames(os.path.join(out, "orbit.mp4"), frames(), len(path))
    if total["complete"]:
        os.remove(os.path.join(out, "checkpoint.npz"))
    print(f"| scene | PSNR | SSIM | views | size | steps | train s | compile s | M samples/s | s per view | machine |\n"
          f"|---|---|---|---|---|---|---|---|---|---|---|\n"
          f"| {os.path.basename(os.path.abspath(args.scene))} | {metrics['psnr']:.2f} dB "
          f"| {'-' if metrics['ssim'] is None else format(metrics['ssim'], '.4f')} "
          f"| {metrics['n_views']} {scene.split}, white | {metrics['image_size'][0]}x{metrics['image_size'][1]} "
          f"| {total['steps']} | {total['train_seconds']:.1f} | {total['compile_seconds']:.1f} "
          f"| {metrics['samples_per_second'] / 1e6:.2f} | {metrics['render_seconds_per_view']:.2f} "
          f"| {arch}, {device} |")
    print(f"{total['rays_dropped']} of {total['rays'] + total['rays_dropped']} rays dropped; "
          f"{metrics['buffer_mb']:.0f} MB of buffers; everything is in {out}")


def measure(m, views, out=None):
    """What train and eval say alike of the held-out views: evaluate(), and the codes' part in it."""
    metrics, fitted = evaluate(m, views, out), evaluate_fitted(m, views) if m.n_code else None
    if fitted is not None:
        metrics["psnr_fitted"] = fitted
        print(f"{fitted:.2f} dB on the views' right halves, their codes fitted to the left halves")
    return dict(metrics, n_views=len(views.size), image_size=views.size[0, 1:3].tolist(), background="white")


def command_render(args):
    """tinynerf.py render: a video, or PNGs, from a run folder."""
    if args.path not in ("orbit", "spiral", "test", "still") and not os.path.isfile(args.path):
        raise UserError(f"--path {args.path}: there is no such file",
                        "give orbit, spiral, test, still, or a file of poses")
    arch, device = start_taichi(args.arch)
    m, info, cameras = load_model(args.run, "cpu" if arch == "cpu" else "gpu")
    own, times = (info["width"], info["height"]), None
    if (args.time is not None or args.path == "still") and not m.moves:
        raise UserError(f"{args.run} is of --model {m.name}, for which time stands still",
                        "train --model nerfies knows scenes that move")
    if args.path in ("orbit", "spiral"):
        fit = orbit_cameras if args.path == "orbit" else spiral_cameras
        path, name = fit(cameras["train"], args.frames or 96), f"{args.path}.mp4"
        sizes = [(*own, 0)] * len(path)
    elif args.path == "test":
        path, sizes, name = cameras["test"], cameras["test_size"][:, 1:].tolist(), "test"
        times = cameras.get("test_time")
    elif args.path == "still":
        path, name = np.repeat(cameras["test"][:1], args.frames or 96, 0), "still.mp4"
        sizes = cameras["test_size"][:1, 1:].tolist() * len(path)
    else:
        path, sizes = read_path(args.path, own)
        name = os.path.splitext(os.path.basename(args.path))[0] + ".mp4"
    path, sizes = path[:args.frames], sizes[:args.frames]
    if args.time is not None:
        times = np.full(len(path), args.time)
    elif times is None:
        times = moments(m, len(path))
    out = args.out or os.path.join(args.run, ("depth_" if args.depth else "render_") + name)
    size = args.size or (sizes[0][:2] if os.path.splitext(out)[1] else None)             # frames of a video are alike
    pixels = max(width * height for width, height, *_ in ([size] if size else sizes))
    check_fits("a picture of that size", 60 * pixels / 1e6, "use a smaller --size")
    span = []

    def render(camera, moment, width, height, lens):
        new_size = size or (width, height)
        set_moment(m, moment)
        rgb, depth = render_view(m, resize_camera(camera, (width, height), new_size), *new_size, lens)
        if not args.depth:
            return to_bytes(rgb)
        if not span and np.isfinite(depth).any():    # one range for all frames: a video must not flicker
            span[:] = depth_range(depth)
        return depth_image(depth, *(span or (0.0, 1.0)))

    frames = (render(camera, moment, *old) for camera, moment, old in zip(path, times, sizes))
    start = time.perf_counter()
    out = write_frames(out, frames, len(path))
    seconds = (time.perf_counter() - start) / len(path)
    print(f"{len(path)} frames in {out}, {seconds:.2f} s a frame on {arch} ({device})")


def command_eval(args):
    """tinynerf.py eval: measure a run folder's model on the held-out views again; changes nothing."""
    arch, device = start_taichi(args.arch)
    m, info, _ = load_model(args.run, "cpu" if arch == "cpu" else "gpu", training=True)
    scene = load_scene(args.scene or info["scene"], info["downscale"],
                       f"where has it moved? eval {args.run} --scene SCENE takes it from there")
    metrics = measure(m, scene.test)
    width, height = metrics["image_size"]
    print(f"{metrics['psnr']:.2f} dB, SSIM {'-' if metrics['ssim'] is None else format(metrics['ssim'], '.4f')} on "
          f"{metrics['n_views']} views ({scene.split}, white background, {width}x{height}), "
          f"{metrics['render_seconds_per_view']:.2f} s a view on {arch} ({device})")


def extract_mesh(m, resolution):
    """The surface on which half of the light would be gone after MESH_LENGTH: (vertices [n, 3] f32 in world units, rgb
    [n, 3] u8, as seen from straight above the surface, triangles [t, 3] i32, counterclockwise from outside). Of an
    unbounded scene it is what lies in the cube around the ball that is not bent."""
    n_side, batch, space = resolution + 1, min(m.settings["march"], m.settings["rays"]), m.space
    low, size = (0.5 - k.RADIUS, 2.0 * k.RADIUS) if space.unbounded else (0.0, 1.0)
    n_points, block, start = n_side**3, 1024, m.new(ti.i32, -(-n_side**3 // 1024))
    opacity, counter = m.new(ti.f32, n_points), m.new(ti.i32, 4)
    vertex_span, triangle_span = m.new(ti.i32, 2 * n_points), m.new(ti.i32, 2 * n_points)
    for first in range(0, n_points, batch):
        n = min(batch, n_points - first)
        k.place_lattice_samples(n, first, n_side, low, size, m.march_sample, m.march_counter)
        if space.unbounded:
            k.contract_samples(m.march_counter, m.march_sample)
        probe(m, m.march_counter)
        k.lattice_opacity(n, first, n_side, MESH_LENGTH * size, m.settings["grid"], m.march_sample, m.march_sigma,
                          m.occupancy, opacity)
    k.count_mesh(n_side, opacity, vertex_span, triangle_span)
    scan(n_points, block, 2**28, vertex_span, start, counter)
    n_vertices = int(counter.to_numpy()[0])
    scan(n_points, block, 2**28, triangle_span, start, counter)
    n_triangles = int(counter.to_numpy()[0])
    vertex, triangle = m.new(ti.f32, max(8 * n_vertices, 1)), m.new(ti.i32, max(3 * n_triangles, 1))
    k.write_vertices(n_side, low, size, opacity, vertex_span, vertex)
    k.write_triangles(n_side, opacity, vertex_span, triangle_span, triangle)

    rgb = np.empty((n_vertices, 3), np.uint8)
    for first in range(0, n_vertices, batch):
        n = min(batch, n_vertices - first)
        k.load_vertices(n, first, vertex, m.sample, m.ray, m.sample_ray, m.ray_code, m.counter)
        if space.unbounded:
            k.contract_samples(m.counter, m.sample)
        k.hash_encode_forward(m.n_levels, m.counter, m.level, m.sample, m.params, m.feature)
        shade(m, neutral_code(m))
        rgb[first:first + n] = to_bytes(m.rgb_sigma.to_numpy()[:4 * n].reshape(n, 4)[:, :3])
    place = vertex.to_numpy()[:8 * n_vertices].reshape(-1, 8)[:, :3]
    return ((place - 0.5) * space.side + np.float32(space.center), rgb,
            triangle.to_numpy()[:3 * n_triangles].reshape(-1, 3))


def drop_specks(place, rgb, triangles):
    """The mesh without the components that have less than SPECK of the largest one's triangles: floaters, and bubbles
    inside of things."""
    label, old = np.arange(len(place)), None
    while not np.array_equal(label, old):            # each vertex takes the least number among those it hangs on
        old = label.copy()
        np.minimum.at(label, triangles.ravel(), np.repeat(label[triangles].min(1), 3))
        label = label[label]
    size = np.bincount(label[triangles[:, 0]], minlength=len(place))
    keep = (size >= SPECK * size.max())[label]
    number = np.cumsum(keep, dtype=np.int32) - 1
    return place[keep], rgb[keep], number[triangles[keep[triangles[:, 0]]]]


def command_mesh(args):
    """tinynerf.py mesh: the model's surface as a triangle mesh with colors, a binary PLY file in the scene's units."""
    arch, device = start_taichi(args.arch)
    m, _, _ = load_model(args.run, "cpu" if arch == "cpu" else "gpu")
    out, start = args.out or os.path.join(args.run, "mesh.ply"), time.perf_counter()
    if not out.lower().endswith(".ply"):
        raise UserError(f"cannot write a mesh as {out}", "end the name in .ply")
    check_fits("the mesh", 30 * (args.resolution + 1) ** 3 / 1e6, "use a smaller --resolution")
    if not m.marches or m.moves:
        raise UserError(f"{args.run} is of --model {m.name}, which has no mesh", "mesh knows ngp and nerfw")
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    place, rgb, triangles = extract_mesh(m, args.resolution)
    if not len(triangles):
        raise UserError(f"{args.run} has no surface: all of it is thin", "train it for longer")
    place, rgb, triangles = drop_specks(place, rgb, triangles)
    vertices = np.empty(len(place), [("place", "<f4", 3), ("rgb", "u1", 3)])
    vertices["place"], vertices["rgb"] = place, rgb
    faces = np.empty(len(triangles), [("n", "u1"), ("vertices", "<i4", 3)])
    faces["n"], faces["vertices"] = 3, triangles
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}",
             *(f"property float {c}" for c in "xyz"), *(f"property uchar {c}" for c in ("red", "green", "blue")),
             f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    with replacing(out) as part:
        pathlib.Path(part).write_bytes("".join(line + "\n" for line in lines).encode() + vertices.tobytes()
                                       + faces.tobytes())
    print(f"{len(vertices)} vertices and {len(faces)} triangles in {out}, "
          f"{time.perf_counter() - start:.1f} s on {arch} ({device})")


KEYS = ("drag: turn", "right drag, arrow keys: shift", "wheel, + and -: nearer, further", "c, d, o: color, depth, "
        "occupied cells", "comma, period: back and forth in time", "r: back to the start", "s: save the picture",
        "h: this help", "escape: quit")


def count_tiles(m, camera, width, height):
    """As render_tiles, but the brighter, the more samples in occupied cells there are along a ray; depth is None."""
    step, grid = step_size(m, m.settings["render_steps"]), m.settings["grid"]
    aim(m, camera, width, height)
    for first in range(0, width * height, m.settings["rays"]):
        n_rays = min(m.settings["rays"], width * height - first)
        start_tile(m, n_rays, first)
        k.count_samples(n_rays, k.END, *step, m.space.unbounded, grid, m.ray, m.ray_step, m.pixel, m.occupancy,
                        m.march_span)
        count = m.march_span.to_numpy()[1:2 * n_rays:2]
        yield np.repeat(1.0 - np.exp(-count[:, None] / 50.0), 3, 1), None


class Window:
    """What `view` shows. The camera turns around a target. While it moves, pictures are as coarse as it takes to be
    quick; when it rests they get finer, up to one ray per pixel, unless something happens meanwhile."""

    def __init__(self, m, cameras, size, own_size, folder):
        """cameras: [n, 22], those of training; own_size: (width, height) of their images; folder: of saved pictures."""
        with refusing("no window can be opened", "'render' makes a video instead"):
            self.gui = ti.GUI("tinynerf", size)
        self.m, self.size, self.folder = m, size, folder
        self.camera = resize_camera(orbit_cameras(cameras, 1)[0], own_size, size)
        _, target, _, self.up, _ = camera_frame(cameras)
        self.at, self.target = self.start = self.camera[3:12:4].astype(np.float64), target
        self.mode, self.help, self.note, self.wanted = "c", True, "", False      # wanted: the picture, in a file
        self.image, self.shown = np.ones((size[1], size[0], 3), np.float32), None            # shown: with the help
        self.time = float(moments(m, 1)[0])          # of scenes that move
        set_moment(m, self.time)
        self.scale, self.coarse = 0, 16              # pixels a ray: of the picture, 0 if there is none; while it moves
        self.cursor = None                           # where the mouse drags
        self.seconds = {"moving": [], "still": []}   # that pictures took

    def poll(self):
        """Show what there is, and do what mouse and keys ask for; whether that asks for another picture, or none."""
        if not self.gui.running:
            return True
        lines, (width, height) = KEYS if self.help else (), self.size
        if self.shown is None:                       # as Taichi wants it: by columns, from below, with a fourth channel
            self.shown = np.zeros((width, height, 4), np.float32)
            self.shown[..., :3] = np.swapaxes(self.image[::-1], 0, 1)
            self.shown[:330, :22 * len(lines) + 16 * self.help, :3] *= 0.25
        self.gui.set_image(self.shown)
        for i, line in enumerate(reversed(lines)):
            self.gui.text(line, (10 / width, (22 * i + 28) / height), 18, 0xffffff)
        self.gui.text(self.note, (10 / width, 1.0 - 6 / height), 18, 0x808080)
        self.gui.show()
        if any([self.handle(event) for event in self.gui.get_events()]):
            self.scale = 0
        if self.wanted and self.scale == 1:
            self.save()
        return self.scale == 0 or not self.gui.running

    def handle(self, event):
        """Do what an event asks for; whether that asks for another picture."""
        gui, key, (x, y) = self.gui, event.key, event.pos
        away = self.at - self.target
        right, up = look_at(self.at, self.target, self.up).reshape(3, 4)[:, :2].T
        shift, zoom, changed = 0.0, 1.0, False
        if key in (gui.LMB, gui.RMB):
            self.cursor = (key, x, y) if event.type == gui.PRESS else None
        elif key == gui.MOVE and self.cursor:
            button, old_x, old_y = self.cursor
            self.cursor = button, x, y
            if button == gui.RMB:                    # what is at the target stays under the mouse
                width = np.linalg.norm(away) * self.size[0] / self.camera[12]
                shift = -width * ((x - old_x) * right + (y - old_y) * self.size[1] / self.size[0] * up)
            else:
                self.turn(2.0 * np.pi * (old_x - x), np.pi * (old_y - y))
                changed = True
        elif key == gui.WHEEL:
            zoom = 0.9 ** float(np.sign(event.delta[1]))
        elif event.type == gui.PRESS:
            steps = {gui.LEFT: -right, gui.RIGHT: right, gui.DOWN: -up, gui.UP: up}
            shift = 0.05 * np.linalg.norm(away) * steps.get(key, 0.0)
            zoom = {"+": 0.9, "=": 0.9, "-": 1.0 / 0.9}.get(key, 1.0)
            if key in (gui.ESCAPE, gui.EXIT):
                gui.running = False
            elif key in (("c", "d", "o") if self.m.marches else ("c", "d")):
                self.mode, changed = key, True
            elif key in (",", ".") and self.m.moves:
                first, second, *_, last = moments(self.m, 21)
                self.time += (second - first) * (1 if key == "." else -1)
                self.time, changed = float(np.clip(self.time, first, last)), True
                set_moment(self.m, self.time)
            elif key == "r":
                (self.at, self.target), changed = self.start, True
            elif key == "h":
                self.help, self.shown = not self.help, None
            elif key == "s":
                self.wanted = True
        if zoom != 1.0 or np.any(shift):
            self.target, changed = self.target + shift, True
            self.at = self.target + zoom * away
        return changed

    def turn(self, around, over):
        """Turn the camera around the target: by angles around the upright axis, and over it, short of the poles."""
        away = self.at - self.target
        height = away @ self.up
        flat = away - height * self.up
        length, radius = np.linalg.norm(away), np.linalg.norm(flat)
        flat = (np.cos(around) * flat + np.sin(around) * np.cross(self.up, flat)) / radius
        angle = np.clip(np.arctan2(height, radius) + over, -1.5, 1.5)
        self.at = self.target + length * (np.cos(angle) * flat + np.sin(angle) * self.up)

    def save(self):
        """The picture as a file with the next free name."""
        number = 0
        while os.path.exists(path := os.path.join(self.folder, f"view_{number:03d}.png")):
            number += 1
        imageio.imwrite(path, to_bytes(self.image))
        self.note, self.wanted = f"saved {path}", False

    def draw(self):
        """The next picture: a coarse one if there is none yet, else one that is twice as fine, unless events want
        another one meanwhile."""
        (width, height), scale, moving = self.size, self.scale // 2 or self.coarse, self.scale == 0
        small = -(-width // scale), -(-height // scale)
        self.camera[:12] = look_at(self.at, self.target, self.up)
        camera, start = resize_camera(self.camera, self.size, small), time.perf_counter()
        rgb, depth = [], []
        for tile, tile_depth in (count_tiles if self.mode == "o" else render_tiles)(self.m, camera, *small):
            rgb.append(tile)
            depth.append(tile_depth)
            if not moving and self.poll():
                return
        image = np.concatenate(rgb)
        if self.mode == "d":
            depth = np.concatenate(depth)
            image = np.repeat(depth_image(depth, *depth_range(depth))[:, None] / np.float32(255), 3, 1)
        image = image.reshape(small[1], small[0], 3)
        self.image, self.shown = image.repeat(scale, 0).repeat(scale, 1)[:height, :width].astype(np.float32), None
        seconds = time.perf_counter() - start
        self.seconds["moving" if moving else "still"].append(seconds)
        self.scale = scale
        if moving and not 0.025 < seconds < 0.07:
            self.coarse = max(1, self.coarse // 2) if seconds < 0.05 else min(2 * self.coarse, 32)

    def run(self):
        """Until the window is closed; then say how quick it was."""
        while self.gui.running:
            if self.scale != 1:
                self.draw()
            self.poll()
        self.gui.close()
        for when, seconds in self.seconds.items():
            if seconds:
                print(f"{len(seconds)} pictures while {when}: median {1e3 * np.median(seconds):.0f} ms, slowest "
                      f"{1e3 * max(seconds):.0f} ms")


def command_view(args):
    """tinynerf.py view: a window onto a run's model, or onto a scene that it trains on meanwhile."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise UserError("there is no display here", "'render' makes a video; over SSH, ssh -X brings a display")
    if any(os.path.exists(os.path.join(args.what, name)) for name in ("model.npz", "checkpoint.npz")):
        arch, _ = start_taichi(args.arch)
        m, info, cameras = load_model(args.what, "cpu" if arch == "cpu" else "gpu")
        own, training = (info["width"], info["height"]), False
        cameras, folder = cameras["train"], args.what
    else:
        scene = load_scene(args.what, args.downscale)
        arch, _ = start_taichi(args.arch)
        m, views = make_model("ngp", scene, place_scene(scene), arch)
        own, cameras, folder, training = scene.train.size[0, 1:3].tolist(), scene.train.camera, ".", True
    window = Window(m, cameras, args.size or (800, max(round(800 * own[1] / own[0]), 1)), own, folder)
    render_view(m, window.camera, 8, 8)              # every kernel is compiled
    if training:
        drawn = [0.0]

        def report(step, psnr, seconds, **_):
            window.note = f"step {step}  {psnr:.1f} dB  {seconds:.0f} s"

        def look(state):
            """Between two steps: a picture at once where the user moves, otherwise now and then."""
            window.poll()
            if time.monotonic() > drawn[0] + 1.0 and not window.wanted:
                window.scale = 0
            if window.scale == 0 or window.wanted:
                with glance(m):
                    window.draw()
                drawn[0] = time.monotonic()
            return not window.gui.running

        window.note = "compiling"
        window.poll()
        length = next({unit: m.settings[unit]} for unit in ("steps", "seconds") if m.settings.get(unit))
        train(m, views, 0, **length, report=report, keep=look, read_every=1)
        window.scale = 0
    window.run()


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
    of a copy, read and written; bytes/s of a gather of random rows of the parameters, read."""
    rng, n_threads = np.random.default_rng(0), count_cores()
    x, weight = rng.random((2**15, k.WIDTH), np.float32), rng.random((k.WIDTH, k.WIDTH), np.float32)
    y, big = np.empty_like(x), rng.random((n_threads, 2**22), np.float32)
    copy, table = np.empty_like(big), rng.random((m.n_rows, k.N_FEATURES), np.float32)
    index = rng.integers(0, len(table), (n_threads, 2**19))
    rows = np.empty(index.shape + (k.N_FEATURES,), np.float32)
    with concurrent.futures.ThreadPoolExecutor(n_threads) as pool:
        return dict(
            product=2 * x.size * k.WIDTH / median_seconds(lambda: np.matmul(x, weight, out=y)),
            copy=2 * big.nbytes / median_seconds(lambda: list(pool.map(np.copyto, copy, big))),
            gather=rows.nbytes / median_seconds(lambda: list(pool.map(
                lambda i, out: np.take(table, i, axis=0, out=out, mode="clip"), index, rows))))


def mlp_work(passes):
    """step_work() of the three kernels of MLPs, for a list of (MLP, samples forward, samples backward)."""
    return {name: dict(product=sum(2 * k.WIDTH * net.n_rows * samples[back] for net, *samples in passes),
                       copy=sum(4 * width(net) * samples[back] for net, *samples in passes))
            for name, back, width in (
                ("mlp_forward", 0, lambda net: net.n_in + k.WIDTH * net.n_hidden + k.OUTPUT),
                ("mlp_backward_input", 1, lambda net: k.OUTPUT + k.WIDTH * (2 * net.n_hidden + 1)),
                ("mlp_backward_weight", 1, lambda net: net.n_in + k.WIDTH * 2 * net.n_hidden + k.OUTPUT))}


def step_work(m, rays, marched, probed, kept, touched):
    """What a training step asks of each kernel: {name: {floor: amount}}, FLOPs of products, bytes that must be read or
    written at least, in a row or (gather) scattered. Marching and random numbers are counted by their bytes, although
    they mostly compute. touched: rows of the parameters that have a gradient."""
    corners = 8 * m.n_levels * 4 * k.N_FEATURES                                  # bytes of table per sample
    work = dict(
        pick_pixels=dict(copy=12 * rays), generate_rays=dict(copy=60 * rays), count_samples=dict(copy=44 * rays),
        sum_counts=dict(copy=16 * rays), scan_blocks=dict(copy=16 * rays // m.settings["block"]),
        claim_spans=dict(copy=24 * rays), write_samples=dict(copy=48 * rays + 20 * marched),
        probe_rays=dict(gather=corners * probed, product=2 * k.WIDTH * (m.density.n_in + 1) * probed,
                        copy=12 * rays + 4 * marched + (16 + 4 * m.density.n_in) * probed),
        count_visible_samples=dict(copy=16 * rays + 4 * marched), mark_lit_cells=dict(copy=8 * rays + 20 * probed),
        keep_visible_samples=dict(copy=16 * rays + 4 * marched + (40 + 4 * 2 * k.WIDTH) * kept),
        density_head_forward=dict(copy=68 * kept), color_input_forward=dict(copy=196 * kept),
        color_head_forward=dict(copy=80 * kept),
        composite_forward=dict(copy=80 * rays + 32 * kept), loss_and_gradient=dict(copy=48 * rays),
        composite_backward=dict(copy=40 * rays + 48 * kept), color_head_backward=dict(copy=96 * kept),
        density_head_backward=dict(copy=224 * kept), hash_encode_backward=dict(gather=2 * corners * kept),
        sum_partials=dict(copy=4 * m.n_weights * (kept // m.settings["chunk"] + 2)),
        adam_step=dict(copy=4 * k.N_FEATURES * m.n_rows, gather=24 * k.N_FEATURES * touched),
        clear_gradients=dict(copy=4 * k.N_FEATURES * touched), load_weights=dict(copy=12 * m.n_weights),
        **mlp_work([(net, kept, kept) for net in m.mlps]))
    if m.space.unbounded:
        work.update(contract_samples=dict(copy=24 * marched), distortion_loss=dict(copy=8 * rays + 20 * kept))
    if m.name == "nerfw":
        del work["composite_backward"]
        work.update(transient_head_forward=dict(copy=84 * kept), transient_head_backward=dict(copy=104 * kept),
                    composite_both_forward=dict(copy=24 * rays + 40 * kept),
                    composite_both_backward=dict(copy=40 * rays + 72 * kept),
                    uncertainty_loss=dict(copy=44 * rays + 20 * kept),
                    transient_input_backward=dict(copy=192 * kept))
    if m.n_code:
        work.update(code_backward=dict(copy=4 * (1 + m.n_code) * kept))
    if m.moves:
        picked, field, (warp, *slices) = 3 * m.n_picked, m.mlps[:2], m.mlps[2:]      # samples of the other losses
        passes = [(warp, marched + kept + 2 * picked, kept + 3 * picked),
                  *((net, kept, kept) for net in field), *((net, marched + kept, kept) for net in slices)]
        work.update(
            warp_input_forward=dict(copy=276 * (marched + 2 * picked)), warp_forward=dict(copy=56 * (marched + picked)),
            **mlp_work(passes), mlp_tangent_forward=mlp_work([(warp, picked, 0)])["mlp_forward"],
            keep_visible_samples=dict(copy=2 * work["keep_visible_samples"]["copy"]),
            hash_position_backward=dict(gather=corners * kept), warp_backward=dict(copy=80 * (kept + picked)),
            code_backward=dict(copy=4 * (1 + N_CODE) * (1 + len(slices)) * (kept + 2 * picked)),
            weigh_samples=dict(copy=4 * rays + 12 * kept), pick_kept_samples=dict(copy=60 * picked),
            warp_tangent_input=dict(copy=276 * picked), elastic_loss=dict(copy=160 * picked),
            pick_static_points=dict(copy=32 * picked), pick_moments=dict(copy=4 * picked),
            static_loss=dict(copy=52 * picked))
        if m.slices:
            work.update(ambient_forward=dict(copy=32 * marched), ambient_backward=dict(copy=32 * kept))
    return work


def sampled_work(m, rays, coarse, fine):
    """step_work() of the models that sample."""
    n, cones, proposed, chunk = coarse + fine, MODELS[m.name].cones, m.nets[0].color is None, m.settings["chunk"]
    levels, twice = ((m.nets[0], coarse), (m.nets[-1], fine)), 2 * rays
    shaded, seen = (fine, rays) if proposed else (n, twice)                  # samples and rays that have color
    layers = [(layer.n_x, k.WIDTH * layer.n_h, k.WIDTH * layer.n_out, samples)
              for net, samples in levels for layer in net.layers]
    product = sum(2 * (n_x + n_h) * n_out * samples for n_x, n_h, n_out, samples in layers)
    through = sum(4 * (n_x + n_h + n_out) * samples for n_x, n_h, n_out, samples in layers)
    n_mlps = k.WIDTH * sum(mlp.n_rows for mlp in m.mlps)
    work = dict(
        pick_pixels=dict(copy=12 * rays), generate_rays=dict(copy=60 * twice), count_even=dict(copy=12 * twice),
        sum_counts=dict(copy=4 * twice), scan_blocks=dict(copy=8 * twice // m.settings["block"]),
        claim_spans=dict(copy=12 * twice), sample_even=dict(copy=20 * twice + 24 * coarse),
        weigh_samples=dict(copy=4 * twice + 12 * coarse),
        sample_where_light_is=dict(copy=24 * twice + 24 * coarse + 24 * fine),
        **{f"{'integrated' if cones else 'frequency'}_encode_forward": dict(copy=4 * (3 + k.WIDTH) * n)},
        layer_forward=dict(product=product, copy=through),
        direction_input_forward=dict(copy=4 * (17 + m.nets[-1].color.n_in) * shaded),
        density_softplus_forward=dict(copy=8 * n), density_softplus_backward=dict(copy=136 * n),
        color_head_forward=dict(copy=24 * shaded), color_head_backward=dict(copy=36 * shaded),
        composite_forward=dict(copy=48 * seen + 24 * shaded), loss_and_gradient=dict(copy=48 * seen),
        composite_backward=dict(copy=40 * seen + 36 * shaded), relu_backward=dict(copy=12 * k.WIDTH * n),
        layer_backward_input=dict(product=sum(2 * n_h * n_out * samples for _, n_h, n_out, samples in layers),
                                  copy=sum(4 * (n_h + n_out) * samples for _, n_h, n_out, samples in layers if n_h)),
        layer_backward_weight=dict(product=product, copy=through),
        **mlp_work([(mlp, samples, samples) for net, samples in levels for mlp in (net.density, net.color) if mlp]),
        sum_partials=dict(copy=4 * sum(net.n_weights * (samples // chunk + 2) for net, samples in levels)),
        adam_step=dict(copy=24 * k.N_FEATURES * m.n_rows), clear_gradients=dict(copy=4 * k.N_FEATURES * m.n_rows),
        load_weights=dict(copy=12 * n_mlps),
        load_layer=dict(copy=12 * (k.N_FEATURES * m.n_rows - n_mlps)))
    if cones:
        work.update(widen_weights=dict(copy=4 * twice + 8 * coarse))
    if proposed:
        work.update(weigh_samples=dict(copy=8 * twice + 12 * n),
                    weigh_samples_backward=dict(copy=8 * rays + 36 * coarse),
                    interlevel_loss=dict(copy=16 * rays + 16 * coarse + 12 * fine))
    if m.space.unbounded:
        work.update(distortion_loss=dict(copy=8 * rays + 20 * fine))
    return work


def floor_seconds(asked, rates):
    """The least that an entry of step_work() takes at these rates: products and memory go on at the same time."""
    seconds = {kind: amount / rates[kind] for kind, amount in asked.items()}
    return max(seconds.pop("product", 0.0), sum(seconds.values()))


def print_budget(work, rates):
    """What a step asks of a device: work as from step_work(); rates: FLOP/s, bytes/s in a row, scattered bytes/s."""
    print("| kernel | MFLOP | MB in a row | MB scattered | floor, ms |\n|---|---|---|---|---|")
    floors = {name: floor_seconds(asked, rates) for name, asked in work.items()}
    for name in sorted(floors, key=lambda name: -floors[name]):
        amounts = (f"{work[name].get(kind, 0) / 1e6:.1f}" for kind in rates)
        print(f"| {name} | {' | '.join(amounts)} | {1e3 * floors[name]:.3f} |")
    print(f"\na step takes at least {1e3 * sum(floors.values()):.2f} ms")


def command_bench(args):
    """tinynerf.py bench: train for a while, then time every kernel of a step against what the machine can do, or, with
    --budget, print what it asks of another one."""
    scene = load_scene(args.scene, args.downscale)
    arch, device = start_taichi(args.arch)
    space = place_scene(scene)
    large = machine_settings(args.model, "gpu", space.unbounded)
    own = large if args.budget else MODELS[args.model].info.get("settings", {}) if args.full else {}
    m, on_device = make_model(args.model, scene, space, arch, {name: large[name] for name in own})
    line, settings, refresh = {}, m.settings, m.settings["refresh"]
    train(m, on_device, 0, steps=args.steps, report=lambda **now: line.update(now))
    rays = line["n_rays"]

    def step():
        replay(MODELS[m.name].step, m, rays, on_device, 0, line["step"], 0.0)         # the model stays as it is
        ti.sync()

    def update():
        if m.marches:
            replay(update_occupancy, m, min(settings["batch"], settings["grid"]**3), 0, 0, line["step"])
            ti.sync()

    if m.marches:
        pack_occupancy(m, line["step"], DARK_AFTER)  # as it is while training goes on

    start = time.perf_counter()
    step()
    first_seconds = time.perf_counter() - start
    first, last = int(m.march_counter.to_numpy()[0]), int(m.counter.to_numpy()[0])
    samples = dict(coarse=first, fine=last)
    if m.marches:
        samples = dict(marched=first, probed=int((m.march_sigma.to_numpy()[:first] >= 0).sum()), kept=last)
        before = m.moment.to_numpy()
        step()
        touched = int((m.moment.to_numpy() != before).reshape(-1, 2 * k.N_FEATURES).any(1).sum())
        work = step_work(m, rays, *samples.values(), touched)
    else:
        work = sampled_work(m, rays, *samples.values())
    counts = (f"{args.scene} after {line['step']} steps: {rays} rays, samples: "
              + ", ".join(f"{n} {name}" for name, n in samples.items()))
    if args.budget:
        print(counts + "\n")
        print_budget(work, dict(zip(("product", "copy", "gather"), (1e9 * rate for rate in args.budget))))
        return

    repeats = int(min(max(30.0 / first_seconds, 3), REPEATS))  # fewer where steps are slow
    step_seconds, update_seconds = median_seconds(step, repeats), median_seconds(update)
    seconds = {}

    def timed(name, kernel):
        def launch(*arguments):
            start = time.perf_counter()
            kernel(*arguments)
            ti.sync()
            seconds[name][-1] += time.perf_counter() - start
        seconds[name] = []
        return launch

    with wrapped_kernels(timed):
        for _ in range(repeats):
            for times in seconds.values():
                times.append(0.0)
            step()
    seconds = {name: float(np.median(times)) for name, times in seconds.items()}

    floors = measure_floors(m)
    work = {name: asked for name, asked in work.items() if seconds[name] and any(asked.values())}    # some have no work
    print(f"{arch} ({device}), {counts}\n"
          f"floors, by NumPy on the CPU: product {floors['product'] / 1e9:.0f} GFLOP/s, copy "
          f"{floors['copy'] / 1e9:.1f} GB/s, gather {floors['gather'] / 1e9:.1f} GB/s\n\n"
          f"| kernel | ms | share | GFLOP/s | GB/s | floor, ms | ratio |\n|---|---|---|---|---|---|---|")
    total, floor_total = sum(seconds.values()), 0.0
    for name, asked in sorted(work.items(), key=lambda item: -seconds[item[0]]):
        floor = floor_seconds(asked, floors)
        moved = sum(amount for kind, amount in asked.items() if kind != "product")
        rates = (f"{amount / seconds[name] / 1e9:.1f}" if amount else "" for amount in (asked.get("product"), moved))
        floor_total += min(floor, seconds[name])                 # some kernels' memory is in the cache already
        print(f"| {name} | {1e3 * seconds[name]:.2f} | {seconds[name] / total:.1%} | {' | '.join(rates)} "
              f"| {1e3 * floor:.2f} | {seconds[name] / floor:.1f} |")
    whole = step_seconds + update_seconds / refresh
    print(f"\nstep {1e3 * step_seconds:.1f} ms ({1e3 * total:.1f} ms one kernel at a time), "
          f"{step_seconds / floor_total:.2f} times the sum of the floors, {1e3 * floor_total:.1f} ms\n"
          + f"update of the occupancy grid {1e3 * update_seconds:.1f} ms, every {refresh} steps\n" * m.marches
          + f"{rays / whole / 1e3:.1f} k rays/s; M samples/s: "
          + ", ".join(f"{n / whole / 1e6:.2f} {name}" for name, n in samples.items()))
    if args.full:                                    # a picture takes as long as training on as many rays
        return
    _, width, height, lens = scene.test.size[0]
    times = [median_seconds(lambda: render_view(m, camera, width, height, lens), 3)
             for camera in scene.test.camera[::max(1, len(scene.test.camera) // 5)][:5]]
    print(f"a {width}x{height} view {np.median(times):.3f} s (median of {len(times)})")


def named_buffers(m):
    """All buffers of a model: {name: ndarray}; those of its MLPs as density.weight and so on. One that has two names
    goes by the first."""
    parts, named = {"": m, "density.": m.density, "color.": m.color}, {}
    for part, of in parts.items():
        for name, x in vars(of).items():
            if isinstance(x, ti.Ndarray) and all(x is not other for other in named.values()):
                named[part + name] = x
    return named


def list_launches(m):
    """What a program around the kernels has to launch, for JSON: {function of this file: [[kernel, argument, ...]]}.
    Arguments are numbers, names of buffers, and names of what the caller of that function gives."""
    names, lists, n_steps = {id(x): name for name, x in named_buffers(m).items()}, {}, m.settings["render_steps"]
    views = types.SimpleNamespace(pixels="views.pixels", size="views.size", camera="views.camera", n="views.n",
                                  margin="views.margin", outlined=not m.space.unbounded,
                                  cropped=not m.space.unbounded, alpha="mask" if m.n_code else "background")
    m.next_view = ("turn", "first_view")
    calls = dict(
        initialize=lambda: m.initialize("seed"), load_weights=lambda: load_weights(m),
        start_occupancy=lambda: start_occupancy(m, views, "view_bound"),
        train_step=lambda: train_step(m, "n_rays", views, "seed", 0, 1.0),
        update_occupancy=lambda: update_occupancy(m, "n_cells", "first", "seed", 0),
        start_tile=lambda: start_tile(m, "n_rays", "first"), march=lambda: march(m, "n_rays", "limit", n_steps),
        forward=lambda: forward(m, "n_rays", n_steps, m.first_code + m.n_photos * m.n_code))
    for call, function in calls.items():
        lists[call] = []
        with wrapped_kernels(lambda name, kernel: lambda *arguments: lists[call].append(
                [name] + [names.get(id(x), x) for x in arguments])):
            function()
    return lists


# For who reads an exported model.json
EXPORT_NOTES = dict(
    buffers="Flat, row-major, little-endian, 4 bytes a number. Those with a file have its contents, the others are 0 "
            "at first. Sizes are those of `settings`: another march, rays, block and chunk make others.",
    launches="By function of tinynerf.py: [kernel, argument, ...] in order, a number or a name each: of a buffer, or "
             "of what the caller gives: pixels, size, camera and margin of the views to train on, view_bound "
             "[n_views, 4], n_rays, n_cells, seed, turn, first_view, first, limit. turn, first_view = rays of all "
             "steps before // n_views and % n_views. update_occupancy comes after start_occupancy, its `first` is the "
             f"sum of n_cells of all updates before, modulo {LAST_CELL}. carve_cells and crop_views are for pinhole "
             "cameras whose alpha is 0 where nothing is; before them, margins leave the middle pixel, w // 2, h // 2, "
             "without them they are 0. `step` is 0 here, and adam_step's learning_rate that of step 0 at a rate of 1: "
             "see adam(). load_weights comes first; a picture is start_tile and then march, forward, until march finds "
             "nothing: see render_view().",
    tasks="What Taichi makes of a kernel: SPIR-V 1.3 in kernels/, entry point main, to be dispatched one after the "
          "other with a barrier between; bindings are of descriptor set 0. The first of two is one thread that "
          "computes the loop's bounds into `temporaries`, a storage buffer for the second (Taichi gives it 1 MB; it "
          "may be bound twice). Loops stride by the number of threads: any number of workgroups is right. Taichi's C "
          "API does all of this: to it, kernels/ is an AOT module.",
    block="`block` is a uniform buffer of block_bytes with the arguments at their offsets: numbers as they are, of an "
          "ndarray 32 bytes: its length in rows as i32, and a pointer at 16 that these kernels do not use.")


def describe_kernels(metadata):
    """Taichi's AOT metadata, boiled down to what a Vulkan program needs: {kernel: description}, see EXPORT_NOTES."""
    described, kinds = {}, {1: "temporaries", 2: "block"}            # of Taichi 1.7's enumeration; 5: ndarray
    for kernel in metadata["kernels"]:
        context, arguments = kernel["ctx_attribs"], []
        offsets = [element["offset"] for element in context["args_type_"]["content"]["elements_"]]
        for offset, (name, p) in zip(offsets, inspect.signature(getattr(k, kernel["name"])).parameters.items()):
            kind = getattr(p.annotation, "dtype", p.annotation)      # a vector's, of a buffer of rows
            arguments.append(dict(name=name, offset=offset, dtype=str(getattr(kind, "dtype", kind)),
                                  **({"width": getattr(kind, "n", 1)} if kind is not p.annotation else {})))
        described[kernel["name"]] = dict(arguments=arguments, block_bytes=context["args_bytes_"], tasks=[
            dict(file=task["name"] + ".spv", workgroup=task["advisory_num_threads_per_group"], bindings={
                bound["binding"]: kinds.get(bound["buffer"]["type"]) or arguments[bound["buffer"]["root_id"][0]]["name"]
                for bound in sorted(task["buffer_binds"], key=lambda bound: bound["binding"])})
            for task in kernel["tasks_attribs"]])
    return described


def command_export(args):
    """tinynerf.py export: a model's buffers, the kernels compiled for Vulkan and the lists of launches, as files for
    programs in other languages."""
    if os.path.exists(args.out):
        raise UserError(f"{args.out} exists", "choose another folder")
    try:
        start_taichi("vulkan")
    except UserError:
        raise UserError("export compiles the kernels for Vulkan, and there is no Vulkan driver here",
                        "install one: mesa-vulkan-drivers of Debian and Ubuntu needs no GPU")
    module = ti.aot.Module(ti.vulkan)                # before any launch: what has run is compiled for this device alone
    for kernel in vars(k).values():
        if hasattr(kernel, "_is_wrapped_kernel"):
            module.add_kernel(kernel)
    if args.init:
        m, filled = Model(MACHINES["cpu"], place_scene(types.SimpleNamespace(capture=False))), ["params", "level"]
        m.initialize(0)
    else:
        m, _, cameras = load_model(args.run, "cpu", training=True)
        if m.name != "ngp":
            raise UserError(f"{args.run} is of --model {m.name}", "export knows ngp alone")
        filled = ["params", "level", "occupancy", "view_camera", "view_size"]            # of the first test view
        m.view_camera.from_numpy(to_cube(cameras["test"][:1], m.space).ravel())
        m.view_size.from_numpy(np.array([0, *cameras["test_size"][0, 1:]], np.int32))
    m.settings = {**m.settings, "hash_chunk": 1}     # a GPU has threads enough
    buffers = {name: dict(dtype=str(x.dtype), shape=[*x.shape, *x.element_shape])
               for name, x in named_buffers(m).items()}
    out = pathlib.Path(os.path.abspath(args.out))
    root = next((path for path in (out, *out.parents) if path.parent.exists()), out)     # the first folder to make
    part = f"{root}.part-{os.getpid()}"
    folder = os.path.join(part, out.relative_to(root))
    try:
        os.makedirs(os.path.join(folder, "kernels"))
        module.save(os.path.join(folder, "kernels"))
        for name in filled:
            buffers[name]["file"] = name + ".bin"
            getattr(m, name).to_numpy().tofile(os.path.join(folder, name + ".bin"))
        kernels = describe_kernels(read_json(os.path.join(folder, "kernels", "metadata.json")))
        model = dict(version=VERSION, notes=EXPORT_NOTES, settings=m.settings, space=vars(m.space), buffers=buffers,
                     launches=list_launches(m), kernels=kernels)
        with open(os.path.join(folder, "model.json"), "w", encoding="utf-8") as file:
            json.dump(model, file, indent=1)
        os.rename(part, root)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    print(f"{len(kernels)} kernels, {len(buffers)} buffers and what a program has to launch are in {args.out}")


def parse_args(argv):
    """The command line as a namespace; UserError for what does not parse."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message, f"see {self.prog} --help")

    def number(kind, least, most):
        def parse(text):
            value = kind(text)
            if not least <= value <= most:           # NaN is not <= either
                raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
            return value
        parse.__name__ = kind.__name__               # argparse says "invalid int value"
        return parse

    def size(text):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
        if not match or not all(1 <= int(n) <= 2**15 for n in match.groups()):
            raise argparse.ArgumentTypeError(f"{text} is not a size like 800x600")
        return int(match[1]), int(match[2])

    count = number(int, 1, 10**9)
    parser = Parser(prog="tinynerf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parser_train = commands.add_parser("train", help="train on a scene and leave a run folder")
    parser_train.add_argument("scene", nargs="?", help="folder of a scene: see data/README.md")
    parser_train.add_argument("--model", choices=MODELS, help="which member of the family (default: ngp)")
    parser_train.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted or killed")
    parser_train.add_argument("--out", help="run folder (default: the next free runs/SCENE)")
    length = parser_train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, help="train for so many steps; repeats exactly on a CPU")
    length.add_argument("--seconds", type=number(float, 1e-9, 1e9), help="train for so long (default on a CPU: 90)")
    parser_train.add_argument("--downscale", type=count, metavar="K", help="average KxK pixels")
    parser_train.add_argument("--seed", type=number(int, -2**31, 2**31 - 1), help="of every random number")
    parser_train.add_argument("--overwrite", action="store_true", default=None,
                              help="replace the run folder --out if it exists")
    parser_train.add_argument("--watch", action="store_true", help="leave a picture, live.png, every few seconds")
    parser_render = commands.add_parser("render", help="render a trained model")
    parser_render.add_argument("run", help="run folder")
    parser_render.add_argument("--path", default="orbit", help="cameras: orbit, spiral, test, still, a file of poses")
    parser_render.add_argument("--time", type=number(float, -1e9, 1e9),
                               help="freeze what moves at this moment (default: it moves)")
    parser_render.add_argument("--frames", type=number(int, 1, 10**6), help="how many (default: 96, or all there are)")
    parser_render.add_argument("--depth", action="store_true", help="distances instead of colors: near is white")
    parser_render.add_argument("--size", type=size, metavar="WxH", help="image size (default: the training images')")
    parser_render.add_argument("--out", help=".mp4, .gif or a folder for PNGs (default: in the run folder)")
    parser_eval = commands.add_parser("eval", help="measure a trained model on its held-out views")
    parser_eval.add_argument("run", help="run folder")
    parser_eval.add_argument("--scene", help="folder of the scene, if it has moved")
    parser_view = commands.add_parser("view", help="look at a trained model, or at one that trains meanwhile")
    parser_view.add_argument("what", metavar="RUN|SCENE", help="run folder, or folder of a scene")
    parser_view.add_argument("--size", type=size, metavar="WxH", help="of the window (default: 800 wide)")
    parser_view.add_argument("--downscale", type=count, default=1, metavar="K", help="average KxK pixels")
    parser_mesh = commands.add_parser("mesh", help="write a trained model's surface as a triangle mesh")
    parser_mesh.add_argument("run", help="run folder")
    parser_mesh.add_argument("-o", "--out", help=".ply (default: mesh.ply in the run folder)")
    parser_mesh.add_argument("--resolution", type=number(int, 8, 1022), default=256, metavar="N",
                             help="cubes per side (256)")
    parser_bench = commands.add_parser("bench", help="time every kernel against what the machine can do")
    parser_bench.add_argument("scene", nargs="?", default="data/lego", help="folder of a scene (default: data/lego)")
    parser_bench.add_argument("--model", choices=MODELS, default="ngp", help="of what (default: ngp)")
    parser_bench.add_argument("--full", action="store_true", help="deep networks, samples a ray as many as on a GPU")
    parser_bench.add_argument("--budget", type=number(float, 1e-3, 1e9), nargs=3, metavar=("FLOPS", "ROW", "SCATTERED"),
                              help="instead: what a step with a GPU's settings asks of one, at so many GFLOP/s, GB/s "
                              "in a row, and scattered GB/s")
    parser_bench.add_argument("--steps", type=count, default=600, help="train for so many steps first")
    parser_bench.add_argument("--downscale", type=count, default=1, metavar="K", help="average KxK pixels")
    for command in commands.choices.values():
        command.add_argument("--arch", choices=("auto", "cpu", "cuda", "vulkan", "metal"))
    parser_export = commands.add_parser("export", help="leave kernels and a model for programs in other languages")
    parser_export.add_argument("run", nargs="?", help="run folder")
    parser_export.add_argument("--init", action="store_true", help="no run's model but a new one, not trained yet")
    parser_export.add_argument("out", metavar="DIR", help="folder to make")
    parser_export.set_defaults(arch="vulkan")
    args = parser.parse_args(argv)
    if args.command == "train":
        if args.resume == "":
            parser_train.error("argument --resume: a run folder is required")
        for name in ("model", "out", "steps", "seconds", "downscale", "seed", "overwrite"):
            if args.resume and vars(args)[name] is not None:
                parser_train.error(f"argument --{name}: not allowed with --resume, which goes on as the run began")
        if not args.resume and not args.scene:
            parser_train.error("the following arguments are required: scene")
        args.model, args.downscale, args.seed = args.model or "ngp", args.downscale or 1, args.seed or 0
    if args.command == "export" and bool(args.run) == args.init:
        parser_export.error("a RUN is required" if not args.run else "argument --init: not allowed with a RUN")
    if args.arch is None and not vars(args).get("resume"):           # a run goes on where it began
        args.arch = "auto"
    for name in ("scene", "resume", "out", "run", "what", "path"):   # where no shell has done so, as in --out=~/x
        if vars(args).get(name):
            setattr(args, name, os.path.expanduser(vars(args)[name]))
    return args


def main(argv=None):
    """Run a command; returns the exit code: 0, or 2 for a mistake of the user."""
    if hasattr(sys.stdout, "reconfigure"):           # a name that cannot be shown there must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parse_args(argv)
        commands = {"train": command_train, "render": command_render, "eval": command_eval, "view": command_view,
                    "mesh": command_mesh, "bench": command_bench, "export": command_export}
        commands[args.command](args)
    except UserError as error:
        print(f"tinynerf: {error}\n          {error.hint}", file=sys.stderr)
        return 2
    except OSError as error:                         # a full disk, a folder that may not be written to
        print(f"tinynerf: {one_line(error)}\n          check the path, its permissions and the free space",
              file=sys.stderr)
        return 2
    except MemoryError:
        print("tinynerf: out of memory\n          use a smaller --size, or a larger --downscale", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tinynerf: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
