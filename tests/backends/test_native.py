"""Tests that only the operators for the CPU need: units of work, threads, argument checks."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DEVICE, DTYPES, LOSSES, Case, judge, relative_error, value_and_grads
from torch._subclasses import FakeTensorMode

from repmtl_kernels import csa_loss, reference, rep_mtl_loss, tsr_loss
from repmtl_kernels._ground.saliency import canonical_tasks
from repmtl_kernels.backends.eager import contrast as eager_contrast
from repmtl_kernels.backends.eager import stages as eager
from repmtl_kernels.backends.native import library as native_library
from repmtl_kernels.backends.native.files import damage

if native_library.status("cpu") != "ok":
    pytest.skip(native_library.status("cpu"), allow_module_level=True)
if DEVICE != "cpu":
    pytest.skip("the operators are for the CPU", allow_module_level=True)

from repmtl_kernels.backends.native import stages as native

ops = native_library.load("cpu")

SEVERAL_UNITS = [
    Case(2, 2, 600, (3, 3)),  # units of 256 rows
    Case(2, 2, 5, (40, 60)),  # blocks of 1024 elements of a row
    Case(2, 2, 5, (40, 60), "channels_last"),
    Case(2, 2, 1500, (5,), "tokens"),
    Case(2, 2, 300, (20, 60), "crop"),
    Case(2, 2, 600, (5, 5)),  # panels of 256 channels
    Case(5, 2, 70, (8, 8), "channels_last"),
    Case(3, 4, 1100, (1, 1)),  # blocks of 512 channels
    Case(3, 4, 1100, (1, 1), "crop"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SEVERAL_UNITS, ids=str)
def test_several_units_of_work(case: Case, dtype: torch.dtype):
    saliencies = canonical_tasks([t.detach() for t in case.make(dtype)], False, case.channel_dim)
    result = native.statistics(saliencies, positions=True, channels=True)
    exact = eager.statistics([s.double() for s in saliencies], positions=True, channels=True)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for name in ("positions", "channels"):
        error = (getattr(result, name).double() - getattr(exact, name)).abs().max()
        assert error <= tolerance * 4, name
    assert torch.equal(result.scale.double(), exact.scale)
    products, expected = native.affinity(saliencies), eager.affinity(saliencies)
    torch.testing.assert_close(products, expected, rtol=1e-12, atol=0)
    judge(LOSSES[2], case, dtype, "native")


@pytest.mark.parametrize("positions", [range(1, 65), range(0)], ids=("own", "library"))
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 96, (7, 7)), Case(3, 2, 9, (3,), "crop"),
        Case(3, 4, 50, (1,)), Case(9, 2, 700, (1, 1), "crop"),
    ],
    ids=str,
)  # fmt: skip
def test_products_of_few_positions_by_own_code_and_by_the_library(monkeypatch, case, positions):
    monkeypatch.setattr(native, "small_positions", lambda: positions)
    judge(LOSSES[2], case, torch.float32, "native")


def test_pooled_samples_that_are_absent():
    saliencies = [torch.randn(6, 700, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([True, False, True, True, False, True])
    exact = [s.detach().double().requires_grad_() for s in saliencies]
    with torch.no_grad():
        for s in saliencies:
            s[~mask] = torch.nan
    total = rep_mtl_loss(saliencies, positions=mask, backend="native").total
    expected = rep_mtl_loss(exact, positions=mask, backend="eager").total
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    grads = torch.stack(torch.autograd.grad(total, saliencies))
    assert not grads[:, ~mask].any()
    expected_grads = torch.stack(torch.autograd.grad(expected, exact))
    assert relative_error(grads.double(), expected_grads) < 1e-5


@pytest.mark.parametrize(
    "case", [SEVERAL_UNITS[0], Case(2, 40, 30, (4, 5)), Case(3, 90, 300, (1,))], ids=str
)
def test_any_number_of_threads_gives_the_same_bits(case: Case):
    saliencies = [t.detach() for t in case.make(torch.float32)]
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            statistics = native.statistics(saliencies, positions=True, channels=True)
            products = native.affinity(saliencies)
            entropy = native.entropy(
                statistics.positions, over="tasks", normalizer="abs", temperature=1.0, eps=0.0,
                with_grad=True,
            )  # fmt: skip
            anchors = ops.unit_anchors(statistics.channels, 0.0, True)
            gram = native.gram(saliencies, statistics.scale, anchors[0], eps=0.0, with_grad=True)
            runs.append([*statistics, products, *entropy, *anchors, *gram])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_blocks_of_the_contrast_give_the_same(monkeypatch):
    case = Case(2, 17, 24, (3,))
    whole = value_and_grads(csa_loss, case, case.make(torch.float64), backend="native")
    five_samples = 2 * 34 * 5
    monkeypatch.setattr(eager_contrast, "products_at_a_time", lambda anchors: five_samples)
    value, grads = value_and_grads(csa_loss, case, case.make(torch.float64), backend="native")
    torch.testing.assert_close(value, whole[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(grads, whole[1], rtol=1e-12, atol=1e-14)


def _damaged(library: Path) -> dict[str, tuple[bytes, str]]:
    """Return contents of a library's file, each with what the report says about it."""
    content = library.read_bytes()
    foreign = bytearray(content)
    foreign[18:20] = (243).to_bytes(2, "little")  # RISC-V
    narrow = bytearray(content)
    narrow[4] = 1  # 32 bits
    half = len(content) // 2
    cut = r"cut off at \d+ bytes"
    return {
        "half": (content[:half], cut),
        "a tenth": (content[: len(content) // 10], cut),
        "all but a page": (content[:-4096], cut),
        "all but a byte": (content[:-1], cut),
        "its header": (content[:64], cut),
        "part of its header": (content[:40], "is not a library"),
        "half, and zeros": (content[:half] + bytes(len(content) - half), "is damaged"),
        "nothing": (b"", "is not a library"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n" * 9, "is not a library"),
        "of another machine": (bytes(foreign), "for another machine .number 243"),
        "of 32 bits": (bytes(narrow), "for another machine"),
        "another library": (
            Path(torch._C.__file__).read_bytes(),
            "has no operators of this package",
        ),
    }


ASK = """
import json, pathlib, sys, torch
import repmtl_kernels
from repmtl_kernels.backends.native import library as native_library
from repmtl_kernels.backends import availability, choice
answers = {}
for folder in map(pathlib.Path, sys.argv[1:]):
    native_library.PACKAGE = folder
    native_library.status.cache_clear(), availability.refusal.cache_clear()
    reason = repmtl_kernels.backend_report()["native"]
    saliencies = [torch.ones(2, 3, 4, requires_grad=True)] * 2
    repmtl_kernels.csa_loss(saliencies).backward()
    try:
        repmtl_kernels.csa_loss(saliencies, backend="native")
        by_name = "no error"
    except ValueError as error:
        by_name = str(error)
    answers[folder.name] = reason, choice.resolve("auto", saliencies[0]), by_name
print(json.dumps(answers))
"""


def _ask(*folders: Path) -> dict:
    command = [sys.executable, "-c", ASK, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="an ELF library")
def test_a_library_that_cannot_be_used_is_a_reason_and_no_crash(tmp_path: Path):
    library = native_library.PACKAGE / native_library.LIBRARIES["cpu"]
    cases = _damaged(library)
    for name, (content, _) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / library.name).write_bytes(content)
    (tmp_path / "a folder" / library.name).mkdir(parents=True)
    (tmp_path / "a pipe").mkdir()
    os.mkfifo(tmp_path / "a pipe" / library.name)
    messages = {name: message for name, (_, message) in cases.items()}
    messages |= dict.fromkeys(("a folder", "a pipe"), "is not a file")
    answers = _ask(*(tmp_path / name for name in messages))
    for name, message in messages.items():
        reason, chosen, by_name = answers[name]
        assert re.search(message, reason) and "nstall the package again" in reason, (name, reason)
        assert chosen == "eager"
        assert by_name.startswith("backend: 'native' cannot run here: ") and reason in by_name


def test_a_library_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    fault = damage(Path(native_library.__file__), None)
    assert fault == "cannot be read (Permission denied)"


@pytest.mark.skipif(sys.platform != "linux", reason="an ELF library")
@pytest.mark.parametrize("options", [[], ["--strip-all"]], ids=["as built", "stripped"])
def test_a_library_without_damage(tmp_path: Path, options: list[str]):
    for name in native_library.LIBRARIES.values():
        library = native_library.PACKAGE / name
        if not library.exists():
            continue
        copy = tmp_path / name
        shutil.copy(library, copy)
        if options and shutil.which("strip"):
            subprocess.run(["strip", *options, str(copy)], check=True)
        assert damage(copy, Path(torch._C.__file__)) is None


GOOD = torch.ones(2, 3, 4)
DOTS = torch.ones(2, 3, 2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.statistics([GOOD, GOOD.double()], True, True), "one dtype and device"),
        (lambda: ops.statistics([GOOD, GOOD[:1]], True, True), "of one shape"),
        (lambda: ops.statistics([GOOD[0]], True, True), "one to three spatial dimensions"),
        (lambda: ops.statistics([GOOD.long()], True, True), "floating-point saliencies"),
        (lambda: ops.affinity([GOOD, GOOD[:1]]), "of one shape"),
        (lambda: ops.affinity([GOOD], GOOD[0] > 0), r"mask: .*shape \(2, 4\)"),
        (lambda: ops.entropy(GOOD[0], True, False, 1.0, 0.0, True), r"x: .*\(T, B, N\)"),
        (lambda: ops.entropy(GOOD.mT, True, False, 1.0, 0.0, True), "x: .*contiguous"),
        (lambda: ops.unit_anchors(GOOD.bfloat16(), 0.0, True), "float32 or float64"),
        (lambda: ops.log_sum_exp(GOOD[:, :, None], 5, 0.5, None), "dots: "),
        (lambda: ops.log_sum_exp(DOTS, 0, 0.5, DOTS[0, :, 0]), r"columns: .*shape \(2, 3\)"),
        (lambda: ops.weigh_dots(DOTS, GOOD[0], GOOD[0], 0, 0.5), r"rows: .*shape \(2, 3\)"),
        (
            lambda: ops.through_normalisation(GOOD, GOOD, GOOD[0, :, 0], GOOD),
            r"factor: .*contiguous tensor of shape \(3\)",
        ),
        (
            lambda: ops.add_outer(
                None, False, GOOD[0], None, GOOD[:0, 0], GOOD[:, :0], torch.ones(3, 4, 5)
            ),
            r"left: expected \(K, B, C\)",
        ),
        (
            lambda: ops.small_gram([torch.ones(2, 3, 65)], GOOD[:1, :2, 0], GOOD[:1, :2, :3], True),
            "at most 64 positions",
        ),
        (lambda: ops.small_gradient([GOOD], [GOOD[:1]], [0], *[GOOD] * 11, None), "of one shape"),
        (lambda: ops.small_gradient([GOOD], [GOOD], [1], *[GOOD] * 11, None), "tasks: .*got 1"),
        (lambda: ops.small_gradient([GOOD], [], [0], *[GOOD] * 11, None), "of 1 tasks, got 0"),
        (lambda: ops.small_gradient([GOOD], [GOOD], [0], *[GOOD] * 11, None), "scale: "),
        (lambda: ops.statistics([GOOD], True, True, GOOD[0] > 0), r"mask: .*shape \(2, 4\)"),
        (lambda: ops.statistics([GOOD], True, True, GOOD[:, 0]), "mask: .*contiguous"),
        (
            lambda: ops.small_gram(
                [GOOD], torch.ones(1, 2), torch.ones(1, 2, 3), True, GOOD[:, :, 0] > 0
            ),
            r"mask: .*shape \(2, 4\)",
        ),
    ],
)
def test_operators_refuse_what_they_cannot_read(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.statistics([torch.ones(0, 3, 4)], True, True),
        lambda: ops.statistics([torch.ones(2, 3, 0)], True, True),
        lambda: ops.statistics([GOOD], False, False),
        lambda: ops.affinity([torch.ones(2, 3, 0)]),
        lambda: ops.entropy(torch.ones(2, 3, 0), True, False, 1.0, 0.0, True),
        lambda: ops.unit_anchors(torch.ones(2, 3, 0), 0.0, True),
        lambda: ops.log_sum_exp(torch.ones(2, 0, 2, 3), 0, 0.5, None),
        lambda: ops.add_outer(
            None, False, GOOD[0], None, GOOD[:0], GOOD[:, :0], torch.ones(2, 3, 0)
        ),
    ],
)
def test_nothing_to_work_on_is_an_error_and_no_crash(call):
    with pytest.raises(RuntimeError, match="expected no size of 0|positions, channels or both"):
        call()


def resident(field: str) -> int:
    """Return the bytes of this process that are in memory: VmRSS, or VmHWM, its maximum."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("shape", "positions", "limit"),
    [
        ((200_000, 16, 1), True, 5),  # one row each: no unit of work as large as for many
        ((4, 2, 1000, 1000), False, 0.5),  # sums over rows that nobody asked for
    ],
)
def test_scratch_memory_follows_the_need(shape, positions, limit):
    saliency = torch.randn(shape)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the maximum starts again
    before = resident("VmRSS")
    kept = ops.statistics([saliency], positions, True)
    assert resident("VmHWM") - before < limit * saliency.nbytes
    assert kept[1].shape == (1, *shape[:2])


def test_a_gradient_of_zero_and_a_total_below_the_normal_numbers():
    x = torch.tensor([[[1e-40, 2e-40, 0.0]]])
    options = {"over": "space", "normalizer": "abs", "temperature": 1.0, "eps": 0.0}
    result = native.entropy(x, **options, with_grad=True)
    expected = eager.entropy(x, **options, with_grad=True)
    torch.testing.assert_close(result, expected)
    assert not result.grad.isnan().any()


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_eps_beside_tiny_saliencies(backend):
    tensors = [(torch.randn(3, 8, 5) * 1e-20).requires_grad_() for _ in range(2)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(csa_loss(tensors, eps=1e-41, backend=backend), tensors)
    exact = torch.autograd.grad(reference.csa_loss(doubles, eps=1e-41), doubles)
    assert relative_error(grads, exact) < 1e-4


def test_strides_that_no_stage_gives():
    a = torch.randn(8, 3, 2).permute(2, 1, 0)
    result, expected = (b.anchors(a, eps=0.0, with_grad=True) for b in (native, eager))
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _arguments() -> dict[str, tuple]:
    u, dots = torch.randn(2, 3, 20), torch.randn(2, 3, 2, 3)
    saliencies = [torch.randn(3, 20, 4, 4) for _ in range(2)]
    da, left, right = torch.randn(3, 20), torch.randn(2, 3, 20), torch.randn(3, 2, 16)
    products = (da, torch.randn(3, 16), left, right)
    return {
        "statistics": (saliencies, True, True),
        "affinity": (saliencies,),
        "entropy": (torch.randn(2, 3, 16), True, False, 1.0, 0.0, True),
        "unit_anchors": (u, 0.0, True),
        "log_sum_exp": (dots, 0, 0.5, torch.zeros(2, 3)),
        "weigh_dots": (dots.clone(), torch.ones(2, 3), torch.ones(2, 3), 0, 0.5),
        "through_normalisation": (u.clone(), u, torch.ones(3), u),
        "add_outer": (None, False, *products, torch.zeros(3, 20, 4, 4)),
        "small_gram": (saliencies, torch.ones(2, 3), u, True),
        "small_gradient": (
            saliencies, [torch.zeros(3, 20, 4, 4)], [1], torch.ones(2, 3), u, torch.ones(3), u, u,
            torch.randn(2, 3, 2, 16), torch.randn(2, 3, 16, 16), torch.ones(2, 3),
            torch.ones(2, 3), torch.ones(3), torch.tensor(1.0), torch.randn(2, 3, 16),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _arguments())
def test_opcheck(name: str):
    tests = ("test_schema", "test_faketensor")  # autograd is that of the losses
    operator = getattr(ops, name).default
    torch.library.opcheck(operator, _arguments()[name], test_utils=tests)
    if operator._schema.arguments[-1].name == "mask":
        with_mask = *_arguments()[name], torch.rand(3, 16) < 0.5
        torch.library.opcheck(operator, with_mask, test_utils=tests)


def test_tsr_of_fake_tensors():
    with FakeTensorMode():
        saliencies = [torch.empty(4, 20, 5, 5).requires_grad_() for _ in range(2)]
        tsr_loss(saliencies, backend="native").backward()
    assert saliencies[0].grad.shape == (4, 20, 5, 5)


def test_a_lazy_copy_is_not_written_through():
    original = torch.zeros(2, 3, 4)
    copy = torch._lazy_clone(original)
    da, left, right = torch.ones(2, 3), torch.ones(0, 2, 3), torch.ones(2, 0, 4)
    ops.add_outer(None, False, da, None, left, right, copy)
    assert (copy == 1).all() and (original == 0).all()
