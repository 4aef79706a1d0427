"""The plan file: written for people, read strictly."""

from __future__ import annotations

import builtins
import re
from dataclasses import asdict, replace

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vramplan
from vramplan.common.files import write_text
from vramplan.errors import VramplanError
from vramplan.hardware.types import Accelerator, Hardware, Host
from vramplan.planfile.file import dump_plan, load_plan, parse_plan, plan_to_dict
from vramplan.planfile.types import Plan
from vramplan.units import GIB

CARD = Accelerator(kind="cuda", index=0, name="made-up card", total_bytes=8 * GIB, free_bytes=8 * GIB)
MACHINE = Hardware(accelerators=(CARD,), host=Host(total_bytes=32 * GIB, available_bytes=30 * GIB))


def make_plan(folder, **options):
    return vramplan.plan(str(folder), device=MACHINE, height=64, width=64, steps=2, simulate=False, **options)


@pytest.fixture(scope="module")
def plan(small_folder):
    """A plan for a video, with everything in it: two decodes, refusals, candidates, a note."""
    folder = small_folder("cogvideox-small")
    made = make_plan(folder, frames=9, allow="near_lossless", settings={"placement": "model_cpu_offload"})
    made = replace(made, model=replace(made.model, source="folder"), notes=("a note: with a colon", "ünïcode ✓"))
    assert made.candidates
    return made


@pytest.fixture(scope="module")
def text(plan):
    return dump_plan(plan)


def content(text):
    return yaml.safe_load(text)


def refused(text, match=None):
    """The one line with which this text is refused."""
    with pytest.raises(VramplanError, match=match) as caught:
        parse_plan(text, name="x.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("x.yaml")
    return message


def without_seconds(value):
    """Seconds are written to four digits, the rest exactly."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if "seconds" not in key}
    return [without_seconds(item) for item in value] if isinstance(value, list | tuple) else value


class TestRoundTrip:
    def test_what_was_read_is_what_was_written(self, plan, text):
        read = parse_plan(text)
        assert isinstance(read, Plan)
        assert read.settings == plan.settings
        assert without_seconds(asdict(read)) == without_seconds(asdict(plan))
        assert read.projected.seconds_per_call == pytest.approx(plan.projected.seconds_per_call, rel=1e-3)

    def test_reading_and_writing_again_changes_no_byte(self, plan):
        text = dump_plan(replace(plan, workload=replace(plan.workload, guidance_scale=6.0)))
        assert dump_plan(parse_plan(text)) == text

    def test_what_was_read_once_is_equal_ever_after(self, text):
        assert parse_plan(dump_plan(parse_plan(text))) == parse_plan(text)

    @pytest.mark.parametrize("kind", ["sd15-small", "flux-small"])
    def test_the_same_inputs_give_the_same_bytes(self, small_folder, kind):
        assert dump_plan(make_plan(small_folder(kind))) == dump_plan(make_plan(small_folder(kind)))

    def test_a_guidance_scale_keeps_its_digits(self, plan):
        exact = replace(plan, workload=replace(plan.workload, guidance_scale=7.123456))
        assert parse_plan(dump_plan(exact)).workload.guidance_scale == 7.123456

    def test_text_of_any_kind_survives(self, plan):
        notes = ("no", "1.5", "~", "- a\n- b", "#", "a_bytes: 5", "é\u2028", "'\"")
        assert parse_plan(dump_plan(replace(plan, notes=notes))).notes == notes

    def test_a_plan_for_the_cpu_too(self, small_folder):
        made = vramplan.plan(str(small_folder("sd15-small")), device="cpu", height=64, width=64)
        read = parse_plan(dump_plan(made))
        assert read.machine.accelerator is None
        assert read.machine.budget.vram_bytes is None


class TestReadable:
    def test_every_size_is_repeated_in_words(self, text):
        lines = [line for line in text.splitlines() if re.match(r"\s*(- )?\w+_bytes: -?\d", line)]
        assert len(lines) > 20
        assert all(re.search(r": -?\d+  # -?[\d.]+ ([KMG]iB|B)$", line) for line in lines)

    def test_each_candidate_is_one_line(self, text, plan):
        lines = text[text.index("\ncandidates:\n") :].splitlines()[2:]
        assert len(lines) == len(plan.candidates)
        assert all(line.startswith("- {settings:") for line in lines)

    def test_the_stock_plan_is_one_line(self, small_folder):
        made = make_plan(small_folder("sd15-small"), settings={"placement.text_encoder": "encode_first"})
        text = dump_plan(made)
        assert [line for line in text.splitlines() if line.startswith("stock: {reason: ")]
        assert parse_plan(text).stock.settings == made.stock.settings
        assert dump_plan(parse_plan(text)) == text

    def test_it_says_what_it_is_and_that_it_may_be_edited(self, text):
        assert text.startswith("# A vramplan plan")
        assert "may be edited" in text.split("schema_version")[0]

    def test_an_edit_of_the_settings_is_taken(self, text, plan):
        read = parse_plan(text.replace("transformer: model_cpu_offload", "transformer: resident", 1))
        assert read.settings.placement["transformer"] == "resident"
        assert read.settings.placement["vae"] == plan.settings.placement["vae"]


class TestStrict:
    @pytest.mark.parametrize(
        "path",
        [
            (),
            ("model",),
            ("model", "components", 0),
            ("workload",),
            ("machine",),
            ("machine", "accelerator"),
            ("machine", "host"),
            ("machine", "budget"),
            ("machine", "budget", "deductions", 0),
            ("settings",),
            ("projected",),
            ("projected", "phases", 0),
            ("candidates", 0),
            ("candidates", 0, "settings"),
            ("candidates", 0, "projected"),
        ],
        ids=lambda path: ".".join(map(str, path)) or "top",
    )
    def test_an_unknown_key_is_refused_by_its_place(self, text, path):
        message = refused(yaml.safe_dump(with_value(content(text), (*path, "surprise"), 1)))
        assert ".".join(map(str, (*path, "surprise"))) in message
        assert "is not a key here" in message

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("workload", "height"), "64"),
            (("workload", "height"), 64.5),
            (("workload", "height"), True),
            (("workload", "height"), None),
            (("workload",), []),
            (("settings", "placement"), "resident"),
            (("settings", "placement", "vae"), 3),
            (("settings", "decode"), "vae_tiling"),
            (("settings", "decode"), {"a": 1}),
            (("machine", "accelerator", "kind"), "tpu"),
            (("machine", "budget", "ram_bytes"), "8GiB"),
            (("model", "components", 0, "weight_bytes"), 1.5),
            (("quality",), "good"),
            (("projected", "basis"), "guessed"),
            (("projected", "phases", 0, "name"), "think"),
            (("candidates", 0, "verdict"), "maybe"),
        ],
    )
    def test_a_wrong_type_is_refused_by_its_place(self, text, path, value):
        message = refused(yaml.safe_dump(with_value(content(text), path, value)))
        assert ".".join(map(str, path)) in message

    @pytest.mark.parametrize("name", ["height", "width", "num_frames", "num_images_per_prompt", "num_inference_steps"])
    @pytest.mark.parametrize("value", [0, -8, 1 << 40])
    def test_a_size_that_no_picture_has_is_refused_by_its_place(self, text, name, value):
        message = refused(yaml.safe_dump(with_value(content(text), ("workload", name), value)))
        assert f"workload.{name} must be a whole number" in message

    @pytest.mark.parametrize(
        "path",
        [("model",), ("settings", "placement"), ("workload", "height"), ("machine", "host"), ("projected", "phases")],
    )
    def test_a_missing_key_is_refused_by_its_place(self, text, path):
        whole = content(text)
        parent = whole
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        assert f"{'.'.join(path)} is missing" in refused(yaml.safe_dump(whole))

    @pytest.mark.parametrize("version", [0, 3, 99, 1.0, "1", 1.5, True, [1], None])
    def test_another_schema_is_refused(self, text, version):
        message = refused(yaml.safe_dump(with_value(content(text), ("schema_version",), version)))
        assert "schema_version" in message

    def test_the_first_schema_which_had_no_stock_is_read(self, text, plan):
        older = content(text) | {"schema_version": 1}
        del older["asked"]["stock"]
        assert "stock" not in older
        assert without_seconds(asdict(parse_plan(yaml.safe_dump(older)))) == without_seconds(asdict(plan))

    def test_a_key_given_twice_is_refused_with_its_line(self, text):
        twice = text.replace("settings:\n", "settings:\n  decode: []\n", 1)
        line = twice.splitlines().index("settings:")
        message = refused(twice, "decode is given twice")
        assert int(re.search(r"line (\d+)", message)[1]) > line

    @pytest.mark.parametrize(
        "bad",
        ["", " \n", "# nothing\n", "null", "3", "a plan", "- 1\n- 2", "[]", "true", "2024-01-01", "---\n---\n"],
    )
    def test_what_is_no_mapping_is_refused(self, bad):
        refused(bad)

    @pytest.mark.parametrize(
        "bad",
        [
            "a: [1, 2",
            "a: b: c",
            "\ta: 1",
            "a: \x00",
            "%YAML 9.9\n---\na: 1",
            "a: 'open",
            "{" * 3000,
            "a: 2024-99-99",
            f"a: {'9' * 5000}",
            f"schema_version: 1\na: 0x{'F' * 6000}",
            "schema_version: 1\n2024-01-01: a",
            "schema_version: 1\n? [a]\n: b",
            "schema_version: 1\n? {a: 1}\n: b",
            "schema_version: 1\na: =",
            "schema_version: 1\na: !!set {b}",
            "schema_version: .nan",
        ],
        ids=lambda bad: bad[:16],
    )
    def test_what_is_no_yaml_or_odd_yaml_is_refused(self, bad):
        refused(bad)


class TestTruncated:
    """A file that was cut off is refused, or says the same: only comments at its end may be gone."""

    def test_at_every_line(self, text, plan):
        lines = text.splitlines(keepends=True)
        alike = lines.index("candidates:\n")  # from there on entries of one kind: some of their lines
        for count in (*range(alike + 12), *range(alike + 12, len(lines), 7)):
            self.check("".join(lines[:count]), plan)

    def test_in_the_middle_of_lines(self, text, plan):
        for end in range(1, len(text), 193):
            self.check(text[:end], plan)

    def check(self, cut, plan):
        read = self.read(cut)
        if isinstance(read, str):
            assert read.startswith("cut.yaml")
            assert "\n" not in read
        else:
            assert (read.settings, read.workload, read.model) == (plan.settings, plan.workload, plan.model)

    def read(self, cut):
        try:
            return parse_plan(cut, name="cut.yaml")
        except VramplanError as error:
            return str(error)

    def test_before_the_settings_end_it_is_always_refused(self, text):
        for end in range(0, text.index("quality:"), 61):
            refused(text[:end])


class TestHostile:
    @pytest.mark.parametrize(
        "tag",
        [
            "!!python/object/apply:os.system ['true']",
            "!!python/object/apply:builtins.print ['ran']",
            "!!python/name:os.system",
            "!!python/module:os",
            "!unknown x",
        ],
    )
    def test_no_tag_makes_code_run(self, monkeypatch, text, tag):
        ran = []
        monkeypatch.setattr("os.system", lambda *_: ran.append("os.system"))
        monkeypatch.setattr(builtins, "print", lambda *_: ran.append("print"))
        message = refused(text.replace("vramplan_version: ", f"vramplan_version: {tag} #", 1))
        assert "a plan has no tags" in message
        assert not ran

    def test_aliases_that_would_fill_the_memory_are_refused_at_once(self):
        laughs = "a0: &a0 [x, x]\n"
        laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
        assert "line 2: not readable YAML (a plan has no aliases)" in refused(laughs)

    def test_an_alias_of_itself_is_refused(self):
        refused("schema_version: 1\nnotes: &a [*a]", "no aliases")


class TestMutated:
    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_no_change_to_the_text_raises_anything_else(self, text, data):
        head = text[: text.index("\ncandidates:\n")]
        start = data.draw(st.integers(0, len(head)))
        end = data.draw(st.integers(start, min(len(head), start + 40)))
        odd = st.text(st.sampled_from(":-[]{}&*!|>'\"%@#?,\n\t 0x1.eé~=\x00"), max_size=12)
        self.parse(head[:start] + data.draw(odd | st.text(max_size=8)) + head[end:])

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=60))
    def test_no_text_at_all_raises_anything_else(self, text):
        self.parse(text)
        self.parse("schema_version: 1\n" + text)

    def parse(self, text):
        message = ""
        try:
            parse_plan(text, name="x.yaml")
        except VramplanError as error:
            message = str(error)
        assert "\n" not in message


class TestLoad:
    def test_a_file_is_named_in_what_is_wrong_with_it(self, tmp_path):
        path = tmp_path / "p.yaml"
        path.write_text("schema_version: 7\n")
        with pytest.raises(VramplanError, match=r"p\.yaml: schema_version 7"):
            load_plan(path)

    @pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\xff\xfe", bytes(range(128, 256))])
    def test_a_binary_file_is_not_text(self, tmp_path, content):
        path = tmp_path / "p.yaml"
        path.write_bytes(content)
        with pytest.raises(VramplanError, match="cannot be read \\(not text\\)"):
            load_plan(path)

    def test_a_missing_file_and_a_folder(self, tmp_path):
        for path in (tmp_path / "none.yaml", tmp_path):
            with pytest.raises(VramplanError, match="cannot be read"):
                load_plan(path)

    def test_what_was_written_is_loaded(self, tmp_path, text, plan):
        write_text(tmp_path / "p.yaml", text)
        assert load_plan(tmp_path / "p.yaml").settings == plan.settings


class TestWriteText:
    def names(self, folder):
        return sorted(path.name for path in folder.iterdir())

    def test_it_replaces_an_older_file(self, tmp_path):
        path = tmp_path / "p.yaml"
        write_text(path, "old, and longer")
        write_text(path, "new")
        assert path.read_text() == "new"
        assert self.names(tmp_path) == ["p.yaml"]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(self, tmp_path, monkeypatch, error):
        path = tmp_path / "p.yaml"
        path.write_text("old")

        def fails(*_):
            raise error

        monkeypatch.setattr("pathlib.Path.replace", fails)
        expected = VramplanError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            write_text(path, "new")
        assert path.read_text() == "old"
        assert self.names(tmp_path) == ["p.yaml"]

    def test_text_that_cannot_be_encoded_leaves_nothing(self, tmp_path):
        with pytest.raises(VramplanError, match="cannot be written"):
            write_text(tmp_path / "p.yaml", "a lone half: \ud800")
        assert self.names(tmp_path) == []

    def test_a_missing_folder_is_said(self, tmp_path):
        with pytest.raises(VramplanError, match=r"none/p\.yaml: cannot be written \(No such file"):
            write_text(tmp_path / "none" / "p.yaml", "new")

    def test_a_folder_in_its_place_is_left(self, tmp_path):
        (tmp_path / "p.yaml").mkdir()
        with pytest.raises(VramplanError, match="cannot be written"):
            write_text(tmp_path / "p.yaml", "new")
        assert self.names(tmp_path) == ["p.yaml"]

    def test_a_folder_that_may_not_be_written_is_said(self, tmp_path, monkeypatch):
        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.NamedTemporaryFile", denied)  # root may write anywhere
        with pytest.raises(VramplanError, match="Permission denied"):
            write_text(tmp_path / "p.yaml", "new")
        assert self.names(tmp_path) == []

    def test_the_file_has_the_rights_of_any_new_file(self, tmp_path):
        (tmp_path / "usual").touch()
        write_text(tmp_path / "p.yaml", "new")
        assert (tmp_path / "p.yaml").stat().st_mode == (tmp_path / "usual").stat().st_mode


def with_value(whole, path, value):
    """The same content with another value at this place."""
    parent = whole
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return whole


def test_the_plan_as_a_mapping_has_the_keys_of_the_contract(plan):
    found = plan_to_dict(plan)
    assert set(found["candidates"][0]) == {"settings", "verdict", "reason", "projected"}
    short = {"vram_allocated_bytes", "vram_reserved_bytes", "ram_bytes", "pinned_bytes", "disk_bytes", "bottleneck"}
    short |= {"seconds_per_step", "seconds_per_call", "seconds_per_step_range", "seconds_per_call_range", "basis"}
    assert set(found["candidates"][0]["projected"]) == short
    assert short <= set(found["projected"])
