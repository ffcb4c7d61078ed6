"""Beginning with another model: its weights, at step 0 and after a kill, or its attention."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from kart import cli, export, models, runs, train, transfer, tree
from kart.analysis import cost, curvature, landscape, section, weights
from kart.runs import donors
from kart.train import Config
from tests.tiny import CONVIT

SHAPE = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4}
TINY = Config(
    operator="softmax", epochs=1, batch_size=8, train_limit=24, threads=1, ema=0.5, **SHAPE
)


@pytest.fixture(scope="module")
def splits():
    whole = train.load_data(TINY)
    val = whole.val._replace(images=whole.val.images[:20], labels=whole.val.labels[:20])
    return train.Splits(whole.train, val)


def change(**fields):
    return dataclasses.replace(TINY, **fields)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vit(operator="softmax", **fields):
    sizes = {"image_size": 8, "in_channels": 1, "num_classes": 10, **SHAPE, **fields}
    return models.create("vit_nano", operator, **sizes)


def images(side=8, count=3):
    return torch.rand(count, 1, side, side, generator=seeded(7))


OPERATORS = ["softmax", "G3B:base=softmax", "G3U:base=softmax", "dog-B:base=softmax,rank=3"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_step_0_has_the_donors_logits(operator):
    donor, model = vit(), vit(operator)
    theirs = donor.init(seeded(1))
    for given in (theirs, tree.named(theirs)):  # nested, or a state dict
        params, drawn = transfer.begin(model, given, seeded(), donor if given is theirs else None)
        assert all("operator" in name for name in drawn)
        assert bool(drawn) == (operator != "softmax")
        found = model.apply(params, images())
        assert_close(found, donor.apply(theirs, images()), rtol=1e-5, atol=1e-5)
        # and the operators have something to learn
        loss = train.batch_loss(model, "native")
        grads, _ = train.value_and_gradients(loss)(params, images(10 - 2), torch.eye(10)[:3])
        for name in drawn:
            if name.endswith("mix"):
                assert tree.named(grads)[name].abs().max() > 0


@pytest.mark.parametrize("operator", ["softmax", "G3B:base=softmax"])
def test_another_size_of_images_is_the_resized_donor(operator):
    donor, model = vit(), vit(operator, image_size=16)
    theirs = donor.init(seeded(1))
    params, drawn = transfer.begin(model, theirs, seeded(), donor)
    assert "pos_embed" not in drawn
    wanted_model, wanted = models.resize(donor, theirs, 16)
    found = model.apply(params, images(16))
    assert_close(found, wanted_model.apply(wanted, images(16)), rtol=1e-5, atol=1e-5)
    # a state dict, in which an operator without parameters leaves nothing
    again, _ = transfer.begin(model, tree.named(theirs), seeded(), donor)
    tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), again, params)


def test_operators_of_a_donor_move_with_it():
    donor, model = vit("G2B"), vit("G2B", image_size=16)
    theirs = donor.init(seeded(1))
    params, drawn = transfer.begin(model, theirs, seeded(), donor)
    assert drawn == []
    wanted_model, wanted = models.resize(donor, theirs, 16)
    assert_close(model.apply(params, images(16)), wanted_model.apply(wanted, images(16)))
    with pytest.raises(ValueError, match="operator"):  # of another rank
        transfer.begin(vit("G2B:rank=5"), theirs, seeded(), donor)
    # softmax has no place for them
    with pytest.raises(
        ValueError, match="unexpected .* Create the model with the donor's operators"
    ):
        transfer.begin(vit(), theirs, seeded(), donor)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("G3B", "polynomial-5B"),
        ("G3B", "bspline-3B"),
        ("dog-B", "mexican_hat-B"),
        ("G3U", "chebyshev-5U"),
        ("shannon-B", "shannon-B:reading=index"),
        ("softmax+G3B", "softmax+polynomial-5B"),
    ],
)
def test_parameters_of_other_functions_are_refused(own, other):
    donor = vit(own)
    for model in (vit(other), vit(other, image_size=16)):
        with pytest.raises(ValueError, match="for '.*mean something else. Create the model with"):
            transfer.begin(model, donor.init(seeded()), seeded(), donor)


SPECS = ["G2B", "softconv", "relative", "static", "gated", "softmax+G2B", "performer"]
ORDERS = ["generated", "by_distance", "by_offset", "elementwise"]


@pytest.mark.parametrize("spec", [*SPECS, *(f"G2B:order={order}" for order in ORDERS)])
def test_an_operator_begins_with_its_own_at_another_size(spec):
    donor = vit(spec)
    params, drawn = transfer.begin(vit(spec, image_size=16), donor.init(seeded()), seeded(), donor)
    assert drawn == [] and params["pos_embed"].shape == (1, 17, 8)


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ("softconv", "softconv:prefix=1"),
        ("gated:prefix=1", "gated"),
        ("softmax+G2B:order=by_offset", "softmax+G2B:order=by_offset,prefix=1"),
        ("relative:rows=2", "relative:rows=4"),
    ],
)
def test_a_lattice_may_be_named_or_left_out(own, other):
    donor, model = vit(own), vit(other, image_size=16 if "rows" in own else 8)
    assert transfer.begin(model, donor.init(seeded()), seeded(), donor).drawn == []
    # without a token in front, or in one row, the same parameters mean something else
    for spec in ("gated:prefix=0,rows=1", "gated:rows=1"):
        with pytest.raises(ValueError, match="'gated' for 'gated:.*mean something else"):
            transfer.begin(vit(spec), vit("gated").init(seeded()), seeded(), vit("gated"))


@pytest.mark.parametrize("change_of", ["base=softmax", "project=simplex", "init=paper"])
def test_what_comes_behind_the_functions_may_change(change_of):
    donor, theirs = vit("G2B"), vit("G2B").init(seeded())
    params, drawn = transfer.begin(vit(f"G2B:{change_of}"), theirs, seeded(), donor)
    assert drawn == [] and torch.equal(
        tree.named(params)["blocks.0.operator.mix"], tree.named(theirs)["blocks.0.operator.mix"]
    )
    # a teacher is who attends as before
    other = vit(f"G2B:{change_of}")
    student = transfer.with_attention(vit(transfer.given()), other)
    if change_of == "init=paper":
        transfer.teach(student.init(seeded()), other, theirs, donor)
    else:
        with pytest.raises(ValueError, match="`attention_from` needs .* mean something else"):
            transfer.teach(student.init(seeded()), other, theirs, donor)


def test_the_head_is_drawn_where_classes_differ():
    donor, theirs = vit(), vit().init(seeded(1))
    for model, same in ((vit(num_classes=7), True), (vit(), False)):
        params, drawn = transfer.begin(model, theirs, seeded(3), donor, same)
        assert set(drawn) == {"head.weight", "head.bias"}
        own = model.init(seeded(3))
        assert torch.equal(params["head"]["weight"], own["head"]["weight"])
        assert torch.equal(params["pos_embed"], theirs["pos_embed"])


def test_a_donor_of_another_width_names_the_leaves():
    with pytest.raises(ValueError, match="another shape"):
        transfer.begin(vit(embed_dim=16), vit().init(seeded()), seeded(), vit())
    with pytest.raises(ValueError, match="patch_size=4"):
        transfer.begin(vit(patch_size=2), vit().init(seeded()), seeded(), vit())


# runs that begin with runs and files


@pytest.fixture(scope="module")
def donor_run(splits, tmp_path_factory):
    home = tmp_path_factory.mktemp("donor") / "run"
    list(runs.execute(home, [TINY], splits))
    return home


def first_weights(home):
    return runs.load_trajectory(home)[0][1]


@pytest.mark.parametrize("kind", ["run", "export", "timm", "wrapped"])
def test_a_run_begins_with_a_run_or_a_file(kind, donor_run, splits, tmp_path):
    trained = runs.only(donor_run)
    start = donor_run
    if kind != "run":
        start = tmp_path / "donor.safetensors"
        about = {"classes": trained.identity.data["classes"]}
        form = "safetensors" if kind == "export" else "timm"
        export.write(start, trained.model, trained.params, about, form)
    if kind == "wrapped":  # as saved of a model that torch's own wrappers hold
        named = {f"module.{name}": x for name, x in tree.named(trained.params).items()}
        safetensors.torch.save_file(named, start)
    config = change(operator="G2B:base=softmax", start=str(start), trajectory=3)
    list(runs.execute(tmp_path / "run", [config], splits))
    (params,) = first_weights(tmp_path / "run")
    model = train.build(config, splits.train)
    wanted = trained.model.apply(trained.params, images())
    assert_close(model.apply(params, images()), wanted, rtol=1e-5, atol=1e-5)
    told = json.loads((tmp_path / "run" / "start.json").read_text())
    assert told["start"] == str(start) and told["taken"] == len(tree.leaves(trained.params))
    assert told["drawn"] and all("operator" in name for name in told["drawn"])


def test_other_classes_of_the_same_number_get_a_new_head(donor_run, splits, tmp_path):
    names = tuple(f"class {i}" for i in range(10))
    other = train.Splits(*(one._replace(classes=names) for one in splits))
    config = change(start=str(donor_run), trajectory=3)
    list(runs.execute(tmp_path / "run", [config], other))
    told = json.loads((tmp_path / "run" / "start.json").read_text())
    assert sorted(told["drawn"]) == ["head.bias", "head.weight"]


def test_a_run_goes_on_without_its_donor(donor_run, splits, tmp_path):
    start = tmp_path / "donor"
    shutil.copytree(donor_run, start)
    config = change(start=str(start), epochs=2, freeze=("blocks", "patch_embed", "cls_token"))
    list(runs.execute(tmp_path / "whole", [config], splits))
    part = runs.execute(tmp_path / "part", [config], splits)
    next(part)
    part.close()
    shutil.rmtree(start)
    list(runs.execute(tmp_path / "part", [config], splits))
    whole, same = ((tmp_path / n / "last.safetensors").read_bytes() for n in ("whole", "part"))
    assert whole == same
    (after,), (before,) = runs.load_weights(tmp_path / "part"), runs.load_weights(donor_run)
    # averages of what stands still are rounded
    tree.map(lambda a, b: assert_close(a, b), after["blocks"], before["blocks"])
    assert not torch.equal(after["head"]["weight"], before["head"]["weight"])


def test_seeds_that_begin_together_share_all_but_what_is_drawn(donor_run, splits, tmp_path):
    names = tuple(f"class {i}" for i in range(10))
    other = train.Splits(*(one._replace(classes=names) for one in splits))
    configs = [change(start=str(donor_run), seed=seed, trajectory=3) for seed in (0, 1)]
    list(runs.execute(tmp_path / "run", configs, other))
    one, two = first_weights(tmp_path / "run")
    assert torch.equal(one["pos_embed"], two["pos_embed"])
    assert not torch.equal(one["head"]["weight"], two["head"]["weight"])
    # a donor of several seeds gives each run its own
    config = change(start=str(tmp_path / "run"), seed=1, trajectory=3)
    list(runs.execute(tmp_path / "second", [config], other))
    (found,) = first_weights(tmp_path / "second")
    assert torch.equal(found["pos_embed"], runs.load_weights(tmp_path / "run")[1]["pos_embed"])
    with pytest.raises(ValueError, match=r"one of \[0, 1\]"):
        list(runs.execute(tmp_path / "third", [dataclasses.replace(config, seed=5)], other))


def test_bad_donors_are_one_line(donor_run, splits, tmp_path):
    def begin(path):
        list(runs.execute(tmp_path / "run", [change(start=str(path))], splits))

    with pytest.raises(ValueError, match="not there"):
        begin(tmp_path / "nowhere")
    (tmp_path / "damaged.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="whole safetensors file"):
        begin(tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match="Name the directory of the run"):
        begin(donor_run / "last.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="missing"):
        begin(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="needs the state to begin with"):
        next(train.fit(change(start=str(donor_run)), splits))


# attention alone


def gated(operator):
    return models.create("convit_nano", operator, **CONVIT, locality=3.0)


@pytest.mark.parametrize("make", [vit, gated])
@pytest.mark.parametrize("teacher", ["softmax", "G3B", "G2U"])
def test_a_student_with_its_teachers_backbone_is_the_teacher(make, teacher):
    teacher, student = make(teacher), make(transfer.given())
    theirs = teacher.init(seeded(1))
    own = student.init(seeded(2))
    shared = tree.named(theirs)
    own = tree.map_named(lambda name, leaf: shared[name], own)
    model = transfer.with_attention(student, teacher)
    own["teacher"] = theirs
    c = teacher.config
    given = images(c.image_size).expand(-1, c.in_channels, -1, -1)
    assert_close(model.apply(own, given), teacher.apply(theirs, given), rtol=1e-5, atol=1e-5)
    seen, wanted = (m.intermediates(p, given) for m, p in ((model, own), (teacher, theirs)))
    assert_close(seen["blocks.1.weights"], wanted["blocks.1.weights"])


@pytest.fixture(scope="module")
def teacher_run(splits, tmp_path_factory):
    home = tmp_path_factory.mktemp("teacher") / "run"
    list(runs.execute(home, [change(operator="G2B")], splits))
    return home


@pytest.mark.parametrize("batching", ["native", "vmap"])
def test_a_student_learns_all_but_where_to_look(batching, teacher_run, splits, tmp_path):
    config = change(
        operator="G2B", attention_from=str(teacher_run), batching=batching, trajectory=3, ema=0.0
    )
    list(runs.execute(tmp_path / "run", [config], splits))
    theirs = runs.only(teacher_run)
    student = runs.only(tmp_path / "run")
    (first,) = first_weights(tmp_path / "run")
    kept = {name: leaf for name, leaf in theirs.params.items() if name != "head"}
    for params in (first, student.params):
        held = {name: params["teacher"][name] for name in kept}
        tree.map(lambda a, b: assert_close(a, b, rtol=0, atol=0), held, kept)
    seen, wanted = (one.model.intermediates(one.params, images()) for one in (student, theirs))
    assert_close(seen["blocks.0.weights"], wanted["blocks.0.weights"])
    assert not torch.allclose(seen["logits"], wanted["logits"])
    assert not torch.equal(first["head"]["weight"], student.params["head"]["weight"])
    # queries and keys play no part, values do
    run = train.solo(config, splits)
    state = train.begin_with(run.init(), first)
    grads, _ = train.program(config, student.model, 3).gradients(state, *run.batch(0))
    qkv = grads["blocks"]["1"]["attn"]["qkv"]["weight"]
    assert not qkv[:16].any() and qkv[16:].abs().min() > 0
    assert not any(leaf.any() for leaf in tree.leaves(grads["teacher"]))
    told = json.loads((tmp_path / "run" / "start.json").read_text())
    (fingerprint,) = told.pop("fingerprints")
    assert told == {"attention_from": str(teacher_run)} and len(fingerprint) == 16


def test_a_student_is_analysed_and_exported_where_it_can_be(
    teacher_run, splits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "load_data", lambda config, **options: splits)
    config = change(operator="G2B", attention_from=str(teacher_run), ema=0.0)
    list(runs.execute(tmp_path / "run", [config], splits))
    argv = ["analyse", str(tmp_path / "run"), "--sections", "scores,attention,mechanism,cost"]
    assert cli.main([*argv, "--retrain", "0", "--examples", "16"]) == 0
    text = capsys.readouterr().out
    assert "`swap` needs a model with attention of its own" in text
    assert text.count("not shown") == 1
    assert "not counted" in (tmp_path / "run" / "report.html").read_text()
    for form in ("safetensors", "timm"):
        path = tmp_path / "student.safetensors"
        command = ["export", str(tmp_path / "run"), "--out", str(path), "--format", form]
        assert cli.main(command) == 2 and not path.exists()
        assert f"attention of its own for {form}" in capsys.readouterr().err


def test_a_donor_is_read_once(donor_run, splits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_data", lambda config, **options: splits)
    seen, read = [], donors.read

    def spy(*args):
        seen.append(args)
        return read(*args)

    monkeypatch.setattr(donors, "read", spy)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    argv = ["train", "--epochs", "1", "--batch-size", "8", "--quiet", *sizes]
    argv += ["--out", str(tmp_path / "run"), "--from"]
    assert cli.main([*argv, str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "run").exists() and len(seen) == 1
    assert cli.main([*argv, str(donor_run)]) == 0
    assert len(seen) == 2 and "began with" in capsys.readouterr().out


def test_the_parameters_of_a_student_are_its_own(
    teacher_run, splits, tmp_path, capsys, monkeypatch
):
    for name, sizes in (("vit_nano", SHAPE), ("convit_nano", {})):
        own = {"image_size": 8, "patch_size": 4, **sizes}
        student = models.create(name, transfer.given(), **own)
        both = transfer.with_attention(student, models.create(name, "G2B", **own))
        assert cost.parameters(both) == cost.parameters(student)
    monkeypatch.setattr(train, "load_data", lambda config, **options: splits)
    argv = ["train", "--operator", "G2B", "--attention-from", str(teacher_run), "--epochs", "1"]
    argv += ["--batch-size", "8", "--quiet", "--out", str(tmp_path / "run")]
    argv += [f"--{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    assert cli.main(argv) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("G2B "))
    assert line.split()[-2] == f"{cost.parameters(vit(transfer.given())).total:,}"


@pytest.mark.parametrize("field", ["start", "attention_from"])
def test_a_run_whose_donor_is_another_by_now_is_refused(
    field, teacher_run, splits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "load_data", lambda config, **options: splits)
    place = tmp_path / "donor"
    shutil.copytree(teacher_run, place)
    config = change(operator="G2B", epochs=2, **{field: str(place)})
    part, whole = tmp_path / "part", tmp_path / "whole"
    next(runs.execute(part, [config], splits))
    list(runs.execute(whole, [config], splits))
    before = (part / "last.safetensors").read_bytes()
    shutil.rmtree(place)
    list(runs.execute(place, [change(operator="G2B", seed=3)], splits))
    for home in (part, whole):
        with pytest.raises(
            ValueError, match=f"`{field}` needs to be what .* began with, got other"
        ):
            next(runs.execute(home, [config], splits))
    assert (part / "last.safetensors").read_bytes() == before
    # it may be gone, or trained again
    for name in ("last", "best"):
        (place / f"{name}.safetensors").unlink()
    assert len(list(runs.execute(part, [config], splits))) == 2


def test_measures_of_a_students_weights_are_of_its_own(teacher_run, splits, tmp_path):
    config = change(operator="G2B", attention_from=str(teacher_run), ema=0.0, trajectory=3)
    list(runs.execute(tmp_path / "run", [config], splits))
    own = {"examples": 8, "points": 11}
    found = section.Context(runs.compare(str(tmp_path / "run")), splits, **own)
    (member,) = found.members()
    count = cost.parameters(found.model(config)).total
    assert tree.size(section.own_params(member.params)) == count < tree.size(member.params)
    names = set(weights.measure(found, member))
    assert "all|end|rms" in names and not any(name.startswith("coefs") for name in names)
    summed = weights.summary(tree.ravel(section.own_params(member.params))[None])
    assert_close(weights.measure(found, member)["all|end|rms"], summed.rms[0])
    curved = curvature.measure(found, member)
    assert "operator_top" not in curved
    assert_close(curved["mean"], curved["trace"] / count)
    # in the random plane the teacher stays
    assert landscape.measure(found, member)["random_surface"].isfinite().all()


def test_a_student_needs_its_teacher_once(teacher_run, splits, tmp_path):
    place = tmp_path / "teacher"
    shutil.copytree(teacher_run, place)
    # of other classes: its classifier plays no part
    names = tuple(f"class {i}" for i in range(10))
    other = train.Splits(*(one._replace(classes=names) for one in splits))
    config = change(operator="G2B", attention_from=str(place), epochs=2)
    list(runs.execute(tmp_path / "whole", [config], other))
    part = runs.execute(tmp_path / "part", [config], other)
    next(part)
    part.close()
    shutil.rmtree(place)
    list(runs.execute(tmp_path / "part", [config], other))
    whole, same = ((tmp_path / n / "last.safetensors").read_bytes() for n in ("whole", "part"))
    assert whole == same


def test_teachers_that_do_not_fit_are_one_line(donor_run, teacher_run, splits, tmp_path):
    def begin(**fields):
        list(runs.execute(tmp_path / "run", [change(**fields)], splits))

    with pytest.raises(ValueError, match="`attention_from` needs a run or .*not there"):
        begin(operator="G2B", attention_from=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="`attention_from` needs a teacher with the operators of"):
        begin(operator="G2B", attention_from=str(donor_run))
    with pytest.raises(ValueError, match="unexpected"):
        begin(operator="softmax", attention_from=str(teacher_run))
    with pytest.raises(ValueError, match="`attention_from` None with `start`"):
        change(start=str(donor_run), attention_from=str(teacher_run))
    with pytest.raises(ValueError, match="needs the state to begin with"):
        next(train.fit(change(operator="G2B", attention_from=str(teacher_run)), splits))


def test_students_and_teachers_that_do_not_match_are_refused():
    teacher = vit("G2B")
    with pytest.raises(ValueError, match="got softmax"):
        transfer.with_attention(vit(), teacher)
    with pytest.raises(ValueError, match="one that all share"):
        student = vit(transfer.given(), sharing="universal")
        transfer.with_attention(student, teacher)
    with pytest.raises(ValueError, match="Match the two models"):
        transfer.with_attention(vit(transfer.given(), depth=1), teacher)


@pytest.mark.parametrize("channels", [1, 3])
def test_filters_of_grey_and_colour_images_fit_each_other(channels):
    donor, model = vit(in_channels=channels), vit(in_channels=4 - channels)
    theirs = donor.init(seeded(1))
    begun = transfer.begin(model, theirs, seeded(), donor)
    assert transfer.channels_of(theirs) == channels and begun.drawn == []
    grey = images()
    colour = grey.expand(-1, 3, -1, -1)
    ours, wanted = (grey, colour) if channels == 3 else (colour, grey)
    # a grey image is the same in each channel
    found = model.apply(begun.params, ours)
    assert_close(found, donor.apply(theirs, wanted), rtol=1e-5, atol=1e-5)
    student = transfer.with_attention(vit(transfer.given(), in_channels=4 - channels), model)
    with pytest.raises(ValueError, match=f"for images of {channels} channels"):
        transfer.teach(student.init(seeded()), model, theirs, donor)


def test_training_says_that_a_donors_filters_were_made_to_fit(tmp_path, capsys):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "colour" / name).mkdir(parents=True)
        for i in range(8):
            picture = Image.new("RGB", (8, 8), (20 * i, 10 * len(name), 99))
            picture.save(tmp_path / "colour" / name / f"{i}.png")
    flags = ["--epochs", "1", "--batch-size", "4", "--embed-dim", "8", "--depth", "1", "--quiet"]
    flags += ["--num-heads", "2", "--patch-size", "4", "--threads", "1", "--train-limit", "8"]
    assert cli.main(["train", *flags, "--out", str(tmp_path / "grey")]) == 0
    argv = ["train", *flags, "--data", str(tmp_path / "colour"), "--from", str(tmp_path / "grey")]
    assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert "its filters, for images of 1 channels, made to fit" in capsys.readouterr().out


def test_given_weights_are_asked_for():
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="needs weights among its parameters, got none"):
        transfer.given().attend({}, x, x, x)
