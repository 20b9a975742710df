"""`vision` makes the pixel values of transformers' image processors, or those of a closed form."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from plugin_helpers import cpu_run, fit

from drivetrain import ConfigError, DataError, Trainer, hookimpl
from drivetrain_plugins import SGD, Loader
from drivetrain_plugins.collate.vision import Vision
from drivetrain_plugins.shared.table import Table

DRAWS = np.random.default_rng(5)
PICTURES = [DRAWS.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((20, 30), (24, 24), (9, 17), (40, 12))]


def collator(split="train", processor=None, **options):
    return Vision(**options).build_collator(cpu_run(processor=processor), split)


def encoded(pixels, form="PNG"):
    """Return a file's bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def in_rows(values, labels=(0, 1, 2, 0)):
    return [{"image": value, "label": label} for value, label in zip(values, labels, strict=False)]


@pytest.fixture(scope="module", params=["ViT", "ConvNext", "CLIP"])
def processor(request):
    """Return an image processor that needs no torchvision."""
    import transformers

    sizes = {
        "ViT": {"size": {"height": 16, "width": 12}},
        "ConvNext": {"size": {"shortest_edge": 32}, "crop_pct": 0.8},
        "CLIP": {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}},
    }
    return getattr(transformers, f"{request.param}ImageProcessorPil")(**sizes[request.param])


def test_pixels_are_those_of_the_runs_processor(processor):
    """Whatever form the images have, the batch is what the image processor makes of the PIL images."""
    wanted = processor(images=[Image.fromarray(p) for p in PICTURES], return_tensors="pt")["pixel_values"]
    forms = {
        "PIL": [Image.fromarray(p) for p in PICTURES],
        "arrays": PICTURES,
        "first channels": [p.transpose(2, 0, 1) for p in PICTURES],
        "tensors": [torch.from_numpy(p) for p in PICTURES],
        "lists": [p.tolist() for p in PICTURES],
        "bytes": [encoded(p) for p in PICTURES],
        "datasets": [{"bytes": encoded(p), "path": None} for p in PICTURES],
    }
    for form, values in forms.items():
        batch = collator(processor=processor)(in_rows(values))
        assert batch["pixel_values"].dtype == torch.float32, form
        assert torch.equal(batch["pixel_values"], wanted), form
        assert batch["labels"].tolist() == [0, 1, 2, 0], form
    table = Table({"image": PICTURES, "label": np.array([0, 1, 2, 0])})
    assert torch.equal(collator(processor=processor)(table)["pixel_values"], wanted)


def test_files_by_path_and_other_modes(tmp_path, processor):
    """Paths are opened; grey, palette and transparent images become RGB; a photo's orientation is honoured."""
    grey, clear = Image.fromarray(PICTURES[0]).convert("L"), Image.fromarray(PICTURES[1]).convert("RGBA")
    palette, photo = Image.fromarray(PICTURES[2]).convert("P"), Image.fromarray(PICTURES[3])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for name, image, more in (
        ("grey", grey, {}),
        ("clear", clear, {}),
        ("palette", palette, {}),
        ("photo", photo, {"exif": exif}),
    ):
        image.save(tmp_path / f"{name}.png", **more)
    images = [
        grey.convert("RGB"),
        clear.convert("RGB"),
        palette.convert("RGB"),
        photo.transpose(Image.Transpose.ROTATE_270),
    ]
    wanted = processor(images=images, return_tensors="pt")["pixel_values"]
    paths = [tmp_path / f"{name}.png" for name in ("grey", "clear", "palette", "photo")]
    assert torch.equal(collator(processor=processor)(in_rows(paths))["pixel_values"], wanted)
    assert torch.equal(collator(processor=processor)(in_rows(map(str, paths)))["pixel_values"], wanted)
    assert torch.equal(collator(processor=processor)(in_rows([grey]))["pixel_values"], wanted[:1])


def test_options_are_the_processors_arithmetic():
    """Without a processor, size, scale, mean and std make what ViT's image processor makes."""
    import transformers

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    reference = transformers.ViTImageProcessorPil(size={"height": 10, "width": 14}, image_mean=mean, image_std=std)
    wanted = reference(images=[Image.fromarray(p) for p in PICTURES], return_tensors="pt")["pixel_values"]
    batch = collator(size=(10, 14), mean=mean, std=std)(in_rows(PICTURES))
    torch.testing.assert_close(batch["pixel_values"], wanted, rtol=0, atol=1e-5)


def test_plain_arrays_are_scaled_only():
    """With no options, equally large images become their bytes over 255; grey ones have one channel."""
    images = [DRAWS.integers(0, 256, (8, 8), dtype=np.uint8) for _ in range(3)]
    batch = collator(mode="L")(in_rows(images))
    torch.testing.assert_close(batch["pixel_values"], torch.tensor(np.stack(images))[:, None] / 255, rtol=0, atol=1e-7)
    colour = collator(mode="L", scale=1.0, mean=(1.0,), size=(8,))(in_rows([images[0][..., None]]))
    assert torch.equal(colour["pixel_values"], torch.tensor(images[0], dtype=torch.float32)[None, None] - 1)


def test_labels_may_be_absent_named_otherwise_or_several():
    """Rows without a label make pixel values alone; a row of class weights stays float; the fields have any name."""
    pixels = PICTURES[0]
    assert set(collator()([{"image": pixels}])) == {"pixel_values"}
    rows = [{"photo": pixels, "kind": [0.0, 1.0]}, {"photo": pixels, "kind": [1.0, 0.0]}]
    assert torch.equal(collator(image="photo", label="kind")(rows)["labels"], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert collator()([{"image": pixels, "labels": 2}])["labels"].tolist() == [2]


def test_flip_mirrors_training_images_by_the_generator():
    """Each training image is mirrored or not by its draw; the same generator makes the same batch; evaluation none."""
    rows = in_rows([PICTURES[0]] * 64, range(64))
    plain = collator()(rows)["pixel_values"]
    make = collator(flip=0.25)
    assert make.stream == "vision"
    made = make(rows, generator=torch.Generator().manual_seed(3))["pixel_values"]
    mirrored = torch.rand(64, generator=torch.Generator().manual_seed(3)) < 0.25
    assert 5 < mirrored.sum() < 30
    assert torch.equal(made, torch.where(mirrored[:, None, None, None], plain.flip(3), plain))
    assert torch.equal(made, make(rows, generator=torch.Generator().manual_seed(3))["pixel_values"])
    assert collator("evaluate", flip=0.25).stream is None
    assert torch.equal(collator("evaluate", flip=0.25)(rows)["pixel_values"], plain)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (encoded(PICTURES[0])[:200], "OSError"),
        (encoded(PICTURES[0], "JPEG")[:300], "OSError"),
        (b"no image at all", "UnidentifiedImageError.*Received: b'no image"),
        (b"", "no image that can be read"),
        ("/nowhere/at-all.png", "FileNotFoundError.*at-all.png"),
        (None, "no image that can be read: TypeError.*NoneType"),
        ({"bytes": None, "path": None}, "no image that can be read: TypeError"),
        (PICTURES[0] / 255, "uint8 of shape.*not ndarray of float64"),
        (np.zeros((5, 5, 6), np.uint8), r"not ndarray of uint8 \(5, 5, 6\)"),
        (np.zeros((0, 5), np.uint8), "no image that can be read"),
        ([[300, 2], [3, 4]], "not list of int64"),
        (7, "not int of int64"),
    ],
)
def test_bad_images_name_field_and_row(value, message):
    """A damaged, missing or impossible image is a DataError with field, row, reason and what was received."""
    with pytest.raises(DataError, match="(?s)vision: field 'image' of row 1 of the batch.*" + message):
        collator(size=(8,))(in_rows([PICTURES[0], value]))


def test_rows_that_make_no_batch_are_refused(processor):
    """Images of several sizes without a size, rows without the field, and what a processor refuses are named."""
    with pytest.raises(DataError, match=r"images of a batch differ in size.*\(9, 17\), \(20, 30\)"):
        collator()(in_rows([PICTURES[0], PICTURES[2]]))
    with pytest.raises(DataError, match=r"rows need the field 'image'. Received: rows with the fields .'picture'"):
        collator()([{"picture": PICTURES[0]}])
    broken = copy.deepcopy(processor)
    broken.image_mean = [1.0, 2.0]
    with pytest.raises(DataError, match=r"vision: .*ImageProcessorPil makes no pixel values of these images"):
        collator(processor=broken)(in_rows(PICTURES))


def test_options_that_contradict_are_refused():
    """A processor beside options, and numbers that do not fit the channels, are errors at assembly."""
    for options, message in (
        ({"processor": object(), "size": (8,)}, "give a processor, or size, mean, std and scale, not both"),
        ({"size": (8, 8, 3)}, "size takes one or two numbers"),
        ({"mean": (0.5, 0.5)}, "size .*; mean and std one, or one a channel"),
    ):
        with pytest.raises(ConfigError, match="vision: " + message):
            Trainer(torch.nn.Linear(1, 1), [Vision(**options), SGD()], steps=1, device="cpu").fit(in_rows(PICTURES))


def test_a_tokenizer_is_no_image_processor(processor):
    """A run's processor that takes text is passed over; one that holds an image processor lends it."""

    class Both:
        image_processor = processor

    class Text:
        model_input_names = ("input_ids",)

    assert collator(processor=Both()).prepare.processor is processor
    assert collator(processor=Text()) == collator()


def test_input_is_unchanged_and_the_collator_pickles(processor):
    """Images hold the same after collating, and a copy for a worker makes the same batch."""
    values = [
        PICTURES[0].copy(),
        Image.fromarray(PICTURES[1]),
        PICTURES[2].transpose(2, 0, 1).copy(),
        encoded(PICTURES[3]),
    ]
    rows = in_rows(values)
    before = [np.asarray(v).tobytes() if not isinstance(v, bytes) else v for v in values]
    make = collator(processor=processor, flip=1.0)
    first = make(rows, generator=torch.Generator().manual_seed(0))
    first["pixel_values"].mul_(0)
    assert [
        np.asarray(r["image"]).tobytes() if not isinstance(r["image"], bytes) else r["image"] for r in rows
    ] == before
    again = pickle.loads(pickle.dumps(make))(rows, generator=torch.Generator().manual_seed(0))
    wanted = make(rows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again["pixel_values"], wanted["pixel_values"])


def test_a_run_draws_by_epoch_and_names_the_bad_row():
    """In a run two epochs flip differently, the same run again flips alike, and a damaged image is named by row."""
    rows = in_rows([DRAWS.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(16)], [0, 1] * 8)

    class Seen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.batches = torch.nn.Linear(108, 2), []

        def forward(self, pixel_values, labels):
            self.batches.append(pixel_values)
            return torch.nn.functional.cross_entropy(self.head(pixel_values.flatten(1)), labels)

    class InOrder:
        rows = 16

        @hookimpl
        def build_sampler(self):
            return self

        def order(self, epoch):
            return torch.arange(16)

    runs = []
    for workers in (0, 2):
        seen = Seen()
        fit(seen, [Vision(flip=0.5), Loader(8, workers=workers), InOrder(), SGD(lr=0.1)], rows, epochs=2)
        runs.append(torch.stack(seen.batches))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0][:2], runs[0][2:])
    rows[11]["image"] = encoded(PICTURES[0])[:100]
    trainer = Trainer(Seen(), [Vision(), Loader(8), SGD()], epochs=1, device="cpu")
    with pytest.raises(DataError, match="train row 11: vision: field 'image' of row 0 of the batch"):
        trainer.fit(rows)
