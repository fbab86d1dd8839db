import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from imagenet import ImageRun
from launching import project, terminal  # noqa: F401
from processes import Run, make_images

from filter_grafting import FileRing

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells start background jobs so, and processes pass it on: those that the tests start shall hear Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    """What a program that is called in this process does on a signal is not for the tests that follow."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make_ring(tmp_path) -> Iterator[Callable[..., FileRing]]:
    """Makes a network's place in a ring of this process; all are left at the end of the test."""
    rings = []

    def make(network: int = 1, networks: int = 2, directory=tmp_path, **options) -> FileRing:
        rings.append(FileRing(directory, network, networks, **options))
        return rings[-1]

    yield make
    for ring in rings:
        ring.leave("stopped")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of a few random images in two classes."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def make_run(tmp_path, images) -> Iterator[Callable[..., Run]]:
    """Makes runs of real processes, none of which outlives the test."""
    runs = []

    def make(networks: int = 2, epochs: int = 3, *flags: str, directory=None, data=images, logs=None) -> Run:
        runs.append(Run(directory or tmp_path / f"run{len(runs)}", data, networks, epochs, flags, logs))
        return runs[-1]

    yield make
    for run in runs:
        run.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, images) -> Callable[..., Run]:
    """Runs to their end, without any fault, once for all tests that compare with them."""
    runs = {}

    def get(networks: int = 2, epochs: int = 3, *flags: str) -> Run:
        key = (networks, epochs, *flags)
        if key not in runs:
            runs[key] = Run(tmp_path_factory.mktemp("undisturbed") / "run", images, networks, epochs, flags).finish()
        return runs[key]

    return get


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """A folder of 48 random images in four classes to train on, and 20 that two ranks share in batches unequally."""
    place = tmp_path_factory.mktemp("class_folders")
    return make_images(place, test="val", classes=("0", "1", "2", "3"), counts=(12, 5))


@pytest.fixture
def make_image_run(tmp_path, class_folders) -> Iterator[Callable[..., ImageRun]]:
    """The same for ImageNet networks."""
    runs = []

    def make(networks: int = 2, epochs: int = 2, *flags: str, ranks: int = 1, data=None) -> ImageRun:
        runs.append(ImageRun(tmp_path / f"run{len(runs)}", data or class_folders, networks, epochs, flags, ranks))
        return runs[-1]

    yield make
    for run in runs:
        run.end()
