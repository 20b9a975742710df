"""`torch-dataset`: both kinds of torch datasets from a function, with their own position where they tell one."""

from __future__ import annotations

import sys

import pytest
from data_helpers import assert_goes_on, drain
from plugin_helpers import fit, net

from drivetrain import ConfigError, DataError, Iterated
from drivetrain_plugins import SGD
from drivetrain_plugins.data._stateful import Stateful
from drivetrain_plugins.data.torch_dataset import TorchDataset

SOURCE = '''
import threading
import torch

class Map(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count, self.asked = count, []
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        if index == 9:
            raise StopIteration
        return {"features": torch.full((6,), float(index)), "labels": torch.tensor(index % 3)}
    def __getitems__(self, indices):
        self.asked.append(indices)
        return [self[i] for i in indices]

class Plain(torch.utils.data.IterableDataset):
    def __init__(self, count):
        self.count = count
    def __iter__(self):
        for index in range(self.count):
            yield {"features": torch.full((6,), float(index)), "labels": torch.tensor(index % 3)}

class Own(Plain):
    """Tells its position itself."""
    at, epoch, started = 0, 0, 0
    def set_epoch(self, epoch):
        self.epoch = epoch
    def __iter__(self):
        start, self.at = self.at, 0
        for index in range(start, self.count):
            self.at = index + 1
            yield 100 * self.epoch + index
        self.at = 0
    def state_dict(self):
        return {"at": self.at, "more": [self.epoch]}
    def load_state_dict(self, state):
        self.at = state["at"]

class Iterators(Plain):
    """Its iterators tell theirs."""
    class Reader:
        def __init__(self, count):
            self.count, self.at = count, 0
        def __iter__(self):
            return self
        def __next__(self):
            if self.at == self.count:
                raise StopIteration
            self.at += 1
            return self.at - 1
        def state_dict(self):
            return {"at": self.at}
        def load_state_dict(self, state):
            self.at = state["at"]
    def __iter__(self):
        return self.Reader(self.count)

class NoJson(Own):
    def state_dict(self):
        return {"at": torch.tensor(self.at)}

class Locked(Own):
    def __init__(self, count):
        super().__init__(count)
        self.lock = threading.Lock()

def make(split, kind="Map", count=12):
    return globals()[kind](count) if split != "evaluate/none" and count else None

def shuffled(split):
    import datasets
    rows = datasets.Dataset.from_list([{"a": n} for n in range(20)]).to_iterable_dataset()
    return rows.map(lambda row: row).shuffle(seed=1, buffer_size=5)

def used_up(split):
    return iter([1])
'''


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    """Put a user's module with datasets on the path."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "datasets_of_a_user.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("datasets_of_a_user", None)


def built(kind, split="train", **arguments):
    return TorchDataset("datasets_of_a_user:make", {"kind": kind, **arguments}).build_dataset(split)


def test_a_map_style_set_is_used_as_it_is():
    """The function gets split and arguments, and its dataset is fetched by whole batches."""
    data = built("Map", count=8)
    assert len(data) == 8
    trainer, _ = fit(net(), [TorchDataset("datasets_of_a_user:make", {"count": 8}), SGD(lr=0.1)], None, epochs=1)
    assert sorted(trainer.run.datasets["train"].asked[0]) == list(range(8))
    assert built("Map", "evaluate/none") is None
    assert TorchDataset("m:f", splits=["a", "b"]).facts == {"splits": ["evaluate/a", "evaluate/b"]}


def test_a_row_that_would_end_the_epoch_silently_is_named():
    """StopIteration out of __getitem__ is an error that names the row."""
    with pytest.raises(DataError, match="train row 9: StopIteration"):
        fit(net(), [TorchDataset("datasets_of_a_user:make"), SGD(lr=0.1)], None, epochs=1)


@pytest.mark.parametrize(
    ("kind", "position"), [("Plain", 5), ("Own", {"at": 5, "more": [0]}), ("Iterators", {"at": 5})]
)
def test_the_position_is_its_own_or_a_count(kind, position):
    """An iterable's own state is its position, that of its iterators too, else the number of rows; all go on exactly."""
    data = built(kind)
    assert isinstance(data, Iterated if kind == "Plain" else Stateful)
    assert drain(data, count=5)[1] == position
    rows = drain(data)[0]
    if kind == "Plain":
        assert [int(row["labels"]) for row in drain(data, 0, 5)[0]] == [n % 3 for n in range(5, 12)]
    else:
        assert assert_goes_on(data) == rows == list(range(12))


def test_a_pass_that_was_left_does_not_change_the_next():
    """Going on from a position, and then starting another epoch, starts at its first row."""
    data = built("Own")
    _, position = drain(data, count=5)
    assert drain(data, 0, position, count=2)[0] == [5, 6]
    assert drain(data, 1)[0] == [100 + n for n in range(12)]


def test_what_cannot_be_used_is_said():
    """A used-up iterator, a buffer that no state holds, state that is no JSON and data that cannot be copied are refused with what to do."""
    with pytest.raises(ConfigError, match=r"an iterable that can be started again\. Received: list_iterator"):
        TorchDataset("datasets_of_a_user:used_up").build_dataset("train")
    with pytest.raises(
        ConfigError, match=r"shuffled with a buffer of 5 rows[^.]*\. Take out its shuffle\(\), and add `shuffle-b"
    ):
        TorchDataset("datasets_of_a_user:shuffled").build_dataset("train")
    with pytest.raises(DataError, match=r"state_dict\(\) of the data must hold JSON values"):
        drain(built("NoJson"), count=1)
    with pytest.raises(ConfigError, match=r"cannot be: .*lock.* Open files and connections in __iter__"):
        drain(built("Locked"))
