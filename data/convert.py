"""convert: the camera poses of COLMAP or LLFF as a transforms.json, the form that instant-ngp and nerfstudio read.

    python data/convert.py photos           leaves photos/transforms.json, and never writes over a file

The folder has images/ and, in sparse/0, cameras.bin and images.bin or the same as .txt (what COLMAP leaves:
https://colmap.github.io/format.html), or has poses_bounds.npy (LLFF: https://github.com/Fyusion/LLFF).

Each image becomes a frame: a camera-to-world matrix in OpenGL's convention (x right, y up, looking down -z) and a lens,
in pixels. A point (x, y, z) in COLMAP's coordinates of the camera (x right, y down, z forward) is seen at

    u = fl_x x' + cx,  v = fl_y y' + cy            (0, 0) is the image's corner, (0.5, 0.5) the first pixel's middle

OPENCV: (x', y') = (x, y) / z times 1 + k1 r^2 + k2 r^4, plus the tangential terms of p1 and p2; r = |(x, y)| / z.
OPENCV_FISHEYE: (x', y') has the direction of (x, y) and the length a (1 + k1 a^2 + k2 a^4 + k3 a^6 + k4 a^8), where a
is the angle between point and axis in radians. The world keeps its axes and its unit.
"""
import argparse
import json
import os
import re
import struct
import sys

import numpy as np

# COLMAP's camera models, with their parameters; without fl_y, it is fl_x
MODELS = {"SIMPLE_PINHOLE": "fl_x cx cy", "PINHOLE": "fl_x fl_y cx cy", "SIMPLE_RADIAL": "fl_x cx cy k1",
          "RADIAL": "fl_x cx cy k1 k2", "OPENCV": "fl_x fl_y cx cy k1 k2 p1 p2",
          "OPENCV_FISHEYE": "fl_x fl_y cx cy k1 k2 k3 k4", "SIMPLE_RADIAL_FISHEYE": "fl_x cx cy k1",
          "RADIAL_FISHEYE": "fl_x cx cy k1 k2"}
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 8, 9), MODELS))
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def convert(folder):
    """The poses in a folder as a dict, what a transforms.json has; None if none are there in a known format.

    "frames" are sorted by file_path, which is relative to the folder, and have w, h as the source says (images may be
    smaller); "source" is what was read; "camera_model" is there too, where it is the same for all frames, since
    nerfstudio looks for it there. ValueError, of one line that names the file, for what is damaged or not supported.
    """
    path = os.path.join(folder, "poses_bounds.npy")
    try:
        for place in ("sparse/0", "sparse", "colmap/sparse/0", ""):
            for ending, source in ((".bin", "COLMAP binary"), (".txt", "COLMAP text")):
                paths = [os.path.join(folder, place, name + ending) for name in ("cameras", "images")]
                if all(map(os.path.isfile, paths)):
                    frames = colmap_frames(folder, *paths)
                    there = any(os.path.isfile(os.path.join(folder, frame["file_path"])) for frame in frames)
                    if there or not os.path.isfile(path):        # LLFF makes its poses, and images_8/, of a model
                        models = {frame["camera_model"] for frame in frames}
                        return dict(frames=frames, source=source,
                                    **(dict(camera_model=models.pop()) if len(models) == 1 else {}))
        if not os.path.isfile(path):
            return None
        return dict(frames=llff_frames(folder, path), source="LLFF", camera_model="OPENCV")
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}")


def image_folder(folder):
    """"images", or if it is missing the images_N with the smallest N: its pictures are 1/N as wide."""
    shrunk = [int(name[7:]) for name in os.listdir(folder) if re.fullmatch(r"images_[1-9][0-9]?", name)]
    return f"images_{min(shrunk)}" if shrunk and not os.path.isdir(os.path.join(folder, "images")) else "images"


def check_numbers(where, numbers):
    """ValueError for what is damaged for certain; NaN is not < either."""
    for number in numbers:
        if not abs(number) < 1e12:
            raise ValueError(f"{where}: {number} is not finite, or absurdly large")


def lens(where, model, width, height, values):
    """What a frame says of its lens, from the parameters of one of COLMAP's camera models."""
    if model not in MODELS:
        raise ValueError(f"{where}: camera model {model!r} is not supported, only {', '.join(MODELS)}: "
                         "undistort the photos, by colmap image_undistorter")
    names = MODELS[model].split()
    if len(values) != len(names):
        raise ValueError(f"{where}: {model} has {len(names)} parameters, not {len(values)}")
    check_numbers(where, values)
    entry = dict(zip(names, map(float, values)))
    focal = entry["fl_x"], entry.setdefault("fl_y", entry["fl_x"])
    side = max(width, height)
    if not (0 < width < 2**20 and 0 < height < 2**20 and 1e-3 * side < min(focal) <= max(focal) < 1e3 * side):
        raise ValueError(f"{where}: {width}x{height} pixels, with focal lengths of {focal[0]:g} and {focal[1]:g}")
    fisheye = model.endswith("FISHEYE")              # nerfstudio reads the first, instant-ngp the second
    return dict(entry, w=width, h=height, camera_model="OPENCV_FISHEYE" if fisheye else "OPENCV", is_fisheye=fisheye)


# ---- COLMAP ---------------------------------------------------------------------------------------------------------

def colmap_frames(folder, cameras_path, images_path):
    """The frames of a model of COLMAP's; its names of images are relative to images/, or to the folder itself."""
    read = (binary_cameras, binary_images) if cameras_path.endswith(".bin") else (text_cameras, text_images)
    lenses = {number: lens(where, *camera) for where, number, *camera in records(cameras_path, read[0])}
    frames, images = {}, image_folder(folder)
    for where, number, name, values in records(images_path, read[1]):
        if name.splitlines() != [name] or "\0" in name or "\ufffd" in name:
            raise ValueError(f"{where}: {name!r} cannot be the name of an image")
        if number not in lenses:
            raise ValueError(f"{where}: {name!r} names camera {number}, which is not in {cameras_path}")
        path = f"{images}/{name}"
        if not os.path.isfile(os.path.join(folder, path)) and os.path.isfile(os.path.join(folder, name)):
            path = name
        if path in frames:
            raise ValueError(f"{where}: there are two poses of {name!r}")
        frames[path] = dict(file_path=path, transform_matrix=colmap_pose(where, values), **lenses[number])
    if not frames:
        raise ValueError(f"{images_path}: no images")
    return [frames[path] for path in sorted(frames)]


def colmap_pose(where, values):
    """Camera to world, 4x4, from a quaternion (w, v) and a translation t that map world to camera, x_c = R x + t.

    R = (2 w^2 - 1) I + 2 v v^T + 2 w [v]x. The inverse is x = R^T (x_c - t); y and z of the camera change sign then,
    as they point down and forward. Like COLMAP it takes quaternions of any length but 0.
    """
    check_numbers(where, values)
    q, t = np.array(values[:4]), np.array(values[4:])
    if np.linalg.norm(q) < 1e-6:
        raise ValueError(f"{where}: a quaternion of length 0 is no rotation")
    w, *v = q / np.linalg.norm(q)
    inverse = (2 * w * w - 1) * np.eye(3) + 2 * np.outer(v, v) + 2 * w * np.cross(v, np.eye(3))      # rows: v x e_i
    return np.vstack([np.column_stack([inverse * (1, -1, -1), -inverse @ t]), (0, 0, 0, 1)]).tolist()


def records(path, read):
    """What one of the readers below finds in a file: (where, id, model, width, height, parameters) of each camera, or
    (where, id of its camera, name, [qw, qx, qy, qz, tx, ty, tz]) of each image."""
    with open(path, "rb") as file:
        yield from read(file)
        if file.read(1):
            raise ValueError(f"{path}: damaged, more follows after the last record")


def take(file, layout):
    """The next values of a little-endian file, which have a struct layout."""
    data = file.read(struct.calcsize("<" + layout))
    if len(data) < struct.calcsize("<" + layout):
        raise ValueError(f"{file.name}: truncated")
    return struct.unpack("<" + layout, data)


def take_count(file, size):
    """A u64 that counts records of so many bytes or more; ValueError if they do not fit into the rest of the file."""
    count, = take(file, "Q")
    left = os.fstat(file.fileno()).st_size - file.tell()
    if count * size > left:
        raise ValueError(f"{file.name}: truncated or damaged, {left} bytes cannot hold the next {count} records")
    return count


def binary_cameras(file):
    """u64 count; of each camera u32 id, i32 model, u64 width, u64 height, f64 parameters."""
    for _ in range(take_count(file, 48)):
        number, model, width, height = take(file, "IiQQ")
        model = NUMBERS.get(model, model)
        values = take(file, f"{len(MODELS.get(model, '').split())}d")          # none for a model that lens() refuses
        yield f"{file.name}, camera {number}", number, model, width, height, values


def binary_images(file):
    """u64 count; of each image u32 id, 7 f64 (the pose), u32 camera, name, 0; u64 count of 2D points, 24 bytes each."""
    for _ in range(take_count(file, 73)):
        image, *values, camera = take(file, "I7dI")
        start = file.tell()
        name, end, _ = file.read(4096).partition(b"\0")
        if not end:
            raise ValueError(f"{file.name}, image {image}: truncated or damaged, its name does not end")
        yield f"{file.name}, image {image}", camera, name.decode("utf-8", "replace"), values
        file.seek(start + len(name) + 1)
        file.seek(24 * take_count(file, 24), os.SEEK_CUR)


def text_lines(file):
    """(where, line without the white space around it) of each line of a file."""
    for i, line in enumerate(file):
        yield f"{file.name}, line {i + 1}", line.decode("utf-8-sig", "replace").strip()


def text_cameras(file):
    """A line is CAMERA_ID MODEL WIDTH HEIGHT PARAMETERS, empty, or a comment after #."""
    for where, line in text_lines(file):
        if line and not line.startswith("#"):
            try:
                number, model, width, height, *values = line.split()
                yield where, int(number), model, int(width), int(height), list(map(float, values))
            except ValueError as error:
                raise ValueError(f"{where}: CAMERA_ID MODEL WIDTH HEIGHT PARAMETERS expected: {error}")


def text_images(file):
    """Two lines are an image: IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, where a name may have spaces in it, and the
    2D points, X Y POINT3D_ID each, or nothing. Empty lines and comments may be between images."""
    lines = text_lines(file)
    for where, line in lines:
        if line and not line.startswith("#"):
            try:
                _, qw, qx, qy, qz, tx, ty, tz, camera, name = line.split(maxsplit=9)
                yield where, int(camera), name, list(map(float, (qw, qx, qy, qz, tx, ty, tz)))
            except ValueError as error:
                raise ValueError(f"{where}: IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME expected: {error}")
            where, points = next(lines, (where, ""))
            if len(points.split()) % 3 or not re.fullmatch(r"(.*\s)?-?\d+|", points):
                raise ValueError(f"{where}: the 2D points of the image above expected, or an empty line")


# ---- LLFF -----------------------------------------------------------------------------------------------------------

def llff_frames(folder, path):
    """The frames of a poses_bounds.npy [n, 17], whose rows are those of the images in the order of their names.

    A row is 3x5 and 2 numbers. The five columns: the camera's axes in the world, pointing down, right and backwards;
    its position; and height, width, focal length. OpenGL has right, up and backwards: the second, minus the first, the
    third. The two numbers bound the depth, which nothing here needs. The header must be plain before NumPy evaluates it
    and makes room for n.
    """
    with open(path, "rb") as file:
        start = file.read(1000)
    header = re.match(rb"\x93NUMPY\x01\0..({'descr': '[<>]f([48])', 'fortran_order': (?:True|False), "
                      rb"'shape': \(([1-9]\d{0,8}), 17\), } *\n)", start, re.S)
    sizes = header and (len(header[1]), len(header[0]) + int(header[3]) * 17 * int(header[2]))
    if sizes != (int.from_bytes(start[8:10], "little"), os.path.getsize(path)):
        raise ValueError(f"{path}: truncated, or no NumPy file of floats [n, 17]: it starts with {start[:72]!r}")
    table, images = np.load(path, allow_pickle=False).astype(np.float64), image_folder(folder)
    names = sorted(name for name in os.listdir(os.path.join(folder, images))
                   if name.lower().endswith(IMAGE_ENDINGS) and name[0] != ".")           # ._IMG.JPG is macOS's
    if len(names) != len(table):
        raise ValueError(f"{path}: {len(table)} poses for {len(names)} images in {os.path.join(folder, images)}")
    frames = []
    for name, row in zip(names, table):
        where = f"{path}, row {len(frames)}, {name!r}"
        check_numbers(where, row[:15])
        down, right, back, position, (height, width, focal) = row[:15].reshape(3, 5).T
        pose = np.vstack([np.column_stack([right, -down, back, position]), (0, 0, 0, 1)])
        entry = lens(where, "SIMPLE_PINHOLE", round(width), round(height), (focal, width / 2, height / 2))
        frames.append(dict(entry, file_path=f"{images}/{name}", transform_matrix=pose.tolist()))
    return frames


# ---- Command line ---------------------------------------------------------------------------------------------------

def main(argv=None):
    """0, or 2 after two lines on stderr: what is wrong, and a hint. No file is written over."""
    if hasattr(sys.stdout, "reconfigure"):           # a name that cannot be shown there must not end in a traceback
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with images and poses")
    parser.add_argument("-o", "--out", help="file to write (default: transforms.json in the folder)")
    args = parser.parse_args(argv)
    out = args.out or os.path.join(args.folder, "transforms.json")
    try:
        hint = "is the copy complete? COLMAP's model_converter can write its models anew"
        scene = convert(args.folder)
        hint = "looked for sparse/0/cameras.bin (or .txt) with images.bin, and for poses_bounds.npy"
        if scene is None:
            raise ValueError(f"no poses in {args.folder}")
        hint = "name another file with -o"
        if os.path.lexists(out):
            raise ValueError(f"{out} exists")
        for frame in scene["frames"]:                # file_path is relative to the JSON file
            path = os.path.relpath(os.path.join(args.folder, frame["file_path"]), os.path.dirname(out) or ".")
            frame["file_path"] = path.replace(os.sep, "/")
        with open(out + ".part", "w", encoding="utf-8") as file:
            json.dump(scene, file, indent=1, allow_nan=False)
        os.replace(out + ".part", out)
    except (ValueError, OSError) as error:
        print(f"convert: {error}\n         {hint}", file=sys.stderr)
        return 2
    first = scene["frames"][0]
    print(f"{out}: {len(scene['frames'])} frames of {first['w']}x{first['h']} pixels, from {scene['source']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
