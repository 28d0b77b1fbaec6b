"""Training runs on small data sets made here."""

from __future__ import annotations

import pytest
import torch
from quality_data import NETWORK, REP_MTL, dense, domains, make_run
from torch import nn

from benchmarks.peers import Forward
from benchmarks.quality import loaders, methods, pretraining, studies, training
from benchmarks.quality.data import Dataset, Split
from benchmarks.quality.pretraining import build
from repmtl_kernels import task_saliencies


@pytest.fixture(autouse=True)
def made_data(monkeypatch):
    monkeypatch.setitem(loaders.LOADERS, "dense", dense)
    monkeypatch.setitem(loaders.LOADERS, "domains", domains)


def execute(run, work):
    return training.execute(run, None, work)


def weights(run, work) -> dict:
    """Return what a run trains to."""
    start = training.start_of(run, None, work)
    trainer = training.Trainer(run, training.prepare(run, None), start)
    for step in range(run.settings["training"]["steps"]):
        trainer.train_step(step)
    return trainer.network.state_dict()


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


# --- training ---


def test_a_finished_run_is_read_not_repeated(tmp_path):
    run = make_run()
    first = execute(run, tmp_path)
    assert execute(run, tmp_path) == first
    assert make_run(seed=1).key != run.key != make_run(training={"lr": 2e-3}).key


@pytest.mark.parametrize("data", ["dense", "domains"])
def test_equal_weighting_is_rep_mtl_without_its_losses(tmp_path, data):
    none = {"lambda_tsr": 0.0, "lambda_csa": 0.0}
    runs = [make_run(data), make_run(data, "rep_mtl", none)]
    for run in runs:
        execute(run, tmp_path)
    assert_equal(weights(runs[1], tmp_path), weights(runs[0], tmp_path))


@pytest.mark.parametrize("method", ["equal", "rep_mtl"])
def test_a_neck_belongs_to_the_network(tmp_path, method):
    """The cut decides what the representation is, not what the network computes."""
    options = {"lambda_tsr": 0.0, "lambda_csa": 0.0} if method == "rep_mtl" else {}
    whole, cut = make_run(), make_run(method=method, options=options, network={"cut": 3})
    parts = weights(cut, tmp_path)
    assert any(name.startswith("neck.") for name in parts)
    joined = {name.replace("neck.", "encoder."): w for name, w in parts.items()}
    torch.testing.assert_close(joined, dict(weights(whole, tmp_path)))
    found, expected = execute(cut, tmp_path)["metrics"], execute(whole, tmp_path)["metrics"]
    assert found["depth"] == pytest.approx(expected["depth"])


@pytest.mark.parametrize("levels", [False, True])
def test_the_representation_before_a_neck(tmp_path, levels):
    run = make_run(method="rep_mtl", options=REP_MTL, network={"cut": 3, "levels": levels})
    trainer = training.Trainer(run, training.prepare(run, None), None)
    (z,) = trainer.forward(trainer.dataset.batch(0, 4, 0)).representations
    shapes = [tuple(level.shape[:2]) for level in (z if levels else [z])]
    assert shapes == [(4, 4), (4, 6)][: 1 + levels]
    assert execute(run, tmp_path)["history"][-1]["ratio"] > 0


def test_necks_that_cannot_be():
    pytest.importorskip("torchjd")
    for network, message in (
        ({"cut": 4}, r"network\.cut: expected 1 to 3; got 4"),
        ({"levels": True}, r"network\.levels: expected false without network\.cut"),
    ):
        with pytest.raises(ValueError, match=message):
            build(dense(), 0, **NETWORK, **network)
    for method, options in (
        ("fairgrad", {}), ("rep_mtl", {"encoder_only": True}), ("rep_mtl", {"balanced": True}),
    ):  # fmt: skip
        run = make_run(method=method, options=options, network={"cut": 3})
        with pytest.raises(
            ValueError, match=rf"network\.cut: expected none with {method}, got one"
        ):
            training.Trainer(run, dense(), None)


def test_a_pretrained_encoder_gets_images_on_its_own_scale(monkeypatch):
    monkeypatch.setitem(training.SCALES, "residual", (127.0, 128.0))
    run = make_run(network={"encoder": "residual"}, training={"label_fraction": 0.5}, task="depth")
    images = torch.tensor([[[[0, 127, 255]]]], dtype=torch.uint8)
    found = training.prepare(run, None).prepared(images)
    torch.testing.assert_close(found, (images.float() - 127) / 128)


def test_a_step_is_the_plain_loop(tmp_path):
    """One step of Adam on the sum of both losses, written out."""
    run = make_run(training={"steps": 1, "batch": 8})
    execute(run, tmp_path)
    data = dense()
    network = build(data, 0, **NETWORK)
    batch = data.batch(0, 8, 0)
    images = batch.inputs.float() / 255
    pixels = data.splits["train"].inputs.float().movedim(1, 0).flatten(1) / 255
    z = network.encoder((images - pixels.mean(1).view(1, 3, 1, 1)) / pixels.std(1).view(1, 3, 1, 1))
    total = 0
    for task in data.tasks:
        output = network.head(task.name, z, (8, 8))
        total = total + task.kind.loss(output, batch.targets[task.name])
    # The rate is halved after half of the steps: here, not in this only one.
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-5)
    total.backward()
    optimizer.step()
    assert_equal(weights(run, tmp_path), network.state_dict())


def test_weighting_methods_differ_from_equal_weighting(tmp_path):
    pytest.importorskip("torchjd")
    for method in ("nash_mtl", "fairgrad"):
        run = make_run("domains", method)
        equal = weights(make_run("domains"), tmp_path)
        assert any(not torch.equal(w, equal[k]) for k, w in weights(run, tmp_path).items())


def test_a_study_on_validation_data_does_not_see_the_test_data(tmp_path, monkeypatch):
    run, on_test = make_run(evaluation={"split": "validation"}), make_run()
    expected = execute(run, tmp_path)["metrics"]
    assert expected != execute(on_test, tmp_path)["metrics"]

    def without_test(folder=None, *, seed=0):
        data = dense(folder, seed=seed)
        return Dataset(data.tasks, {k: v for k, v in data.splits.items() if k != "test"})

    monkeypatch.setitem(loaders.LOADERS, "dense", without_test)
    assert execute(run, tmp_path / "without")["metrics"] == expected
    with pytest.raises(ValueError, match=r"evaluation.split: .* train, validation; got 'test'"):
        execute(on_test, tmp_path / "without")


@pytest.mark.parametrize("log", [{}, {"log_losses": True, "log_offset": 0.01}], ids=["", "log"])
def test_encoder_only_leaves_the_heads_the_gradient_of_their_losses(tmp_path, log):
    options = {"strength": 0.5, **log}
    one_step = {"training": {"steps": 1}}
    plain = weights(make_run("dense", "rep_mtl", {**log, "strength": 0.0}, **one_step), tmp_path)
    whole = weights(make_run("dense", "rep_mtl", options, **one_step), tmp_path)
    options["encoder_only"] = True
    only = weights(make_run("dense", "rep_mtl", options, **one_step), tmp_path)
    for name, weight in only.items():
        if "running" in name or "num_batches" in name:
            continue
        torch.testing.assert_close(weight, (plain if name.startswith("heads") else whole)[name])


@pytest.mark.parametrize("log", [{}, {"log_losses": True, "log_offset": 0.01}], ids=["", "log"])
def test_balanced_tasks_have_saliencies_of_one_size(log):
    torch.manual_seed(0)
    encoder, heads = nn.Linear(3, 4), [nn.Linear(4, 2), nn.Linear(4, 2)]
    z = encoder(torch.randn(5, 3))
    losses = [1e3 * heads[0](z).tanh().square().mean(), heads[1](z).square().mean()]
    method = methods.make("rep_mtl", {"strength": 0.1, "balanced": True, **log}, 2, 10)
    seen = []
    method.criterion.register_forward_hook(
        lambda module, arguments, total: seen.append((task_saliencies(*arguments), total))
    )
    method.backward(Forward(encoder, heads, losses, [z]))
    ((saliencies, total),) = seen
    for saliency in saliencies:
        torch.testing.assert_close(saliency.abs().mean(), torch.tensor(1.0))
    objectives = [(loss + 0.01).log() if log else loss for loss in losses]
    plain = total - method.criterion.last.regularizer
    torch.testing.assert_close(plain.detach(), sum(objectives).detach())


def test_decay_ends_at_zero():
    method = methods.make("rep_mtl", {"strength": 0.1, "decay_share": 0.5}, 2, 8)
    strengths = []
    for step in range(6):
        method.calls = step
        method.heads_context()
        strengths.append(method.criterion.strength)
    assert strengths == pytest.approx([0.1, 0.075, 0.05, 0.025, 0, 0])


def test_batches_cover_an_epoch_and_differ_by_task_and_seed():
    data = domains()
    assert data.batch_size(100) == 12
    for task, count in (("a", 12), ("b", 15)):
        train = data.splits["train"]
        steps = [data.batch(step, 3, 0).of(task) for step in range(count // 3)]
        epoch = torch.cat(steps)
        assert sorted(epoch[:, 0].tolist()) == sorted(train.of(task)[:, 0].tolist())
        following = data.batch(count // 3, 3, 0).of(task)
        assert not torch.equal(following, steps[0])
        assert not torch.equal(data.batch(0, 3, 1).of(task), steps[0])


def test_single_task_runs_start_from_the_same_weights():
    data = dense()
    both, one = build(data, 3, **NETWORK), build(data.only("depth"), 3, **NETWORK)
    shared = {k: v for k, v in both.state_dict().items() if "segmentation" not in k}
    # Only the bias that is set to the mean of the training targets is computed from the data.
    assert_equal(one.state_dict(), shared)
    valid = data.splits["train"].targets["depth"][2:]
    torch.testing.assert_close(one.heads["depth"].project[-1].bias, valid.mean().view(1))
    assert not torch.equal(build(data, 4, **NETWORK).encoder[0].weight, both.encoder[0].weight)


def test_flipping_mirrors_images_and_labels_alike():
    images = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4).to(torch.uint8)
    normals = torch.randn(2, 3, 2, 4)
    batch = Split(images, {"normals": normals})
    sign = torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    seen = set()
    for seed in range(8):
        found = training.flipped(batch, seed)
        for i in range(2):
            turned = bool((found.inputs[i] == images[i].flip(-1)).all())
            expected = normals[i].flip(-1) * sign if turned else normals[i]
            assert turned or torch.equal(found.inputs[i], images[i])
            assert torch.equal(found.targets["normals"][i], expected)
            seen.add(turned)
    assert seen == {True, False}


def test_learning_rate_halves():
    settings = {"lr": 8.0, "steps": 10, "halve_at": [0.5, 0.8]}
    rates = [training.learning_rate(settings, step) for step in range(10)]
    assert rates == [8.0] * 5 + [4.0] * 3 + [2.0] * 2


def test_pretraining_gives_every_method_the_same_better_encoder(tmp_path):
    data, how = "dense", {"kind": "rotation", "steps": 3, "batch": 4}
    runs = [make_run(data, pretraining=how), make_run(data, "rep_mtl", REP_MTL, pretraining=how)]
    assert runs[0].pretraining_key == runs[1].pretraining_key != None  # noqa: E711
    records = studies.run_all(runs, 1, folder=None, work=tmp_path)
    assert len(records) == 2
    (file,) = tmp_path.glob("*.encoder.pt")
    learned = torch.load(file, weights_only=True)
    settings = runs[0].settings
    made = loaders.LOADERS[data]()
    fresh = build(made, 0, **settings["network"]).encoder.state_dict()
    assert learned.keys() == fresh.keys()
    assert any(not torch.equal(learned[k], fresh[k]) for k in fresh)
    trainer = training.Trainer(runs[1], made, training.start_of(runs[1], None, tmp_path))
    assert_equal(trainer.network.encoder.state_dict(), learned)


def test_pretraining_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"pretraining\.kind: expected rotation; got 'x'"):
        pretraining.pretrained(dense(), make_run(pretraining={"kind": "x"}).settings, 0)


def test_rotations_are_quarter_turns_of_the_square():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    found = pretraining.rotated(image.expand(4, 1, 3, 4), torch.arange(4))
    for turns in range(4):
        assert torch.equal(found[turns, 0], image[0, 0, :, :3].rot90(turns))
