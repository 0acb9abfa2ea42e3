"""Whatever one types: names, values, defaults, help."""

import concurrent.futures
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ONE, QUICK, ROOT, TINY, assert_one_line, psnr, run_cli, run_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cnn_vis
from cnn_vis_lib.presets import PRESETS


def test_help_is_instant():
    """It takes twice as long as importing NumPy at most, whatever the machine, and however busy it
    is: compared is the least work, not the time, of as many tries as that takes."""

    def work(*words):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = os.environ | {"OPENBLAS_NUM_THREADS": ""}
        words = [sys.executable, *words]
        subprocess.run(words, stdout=subprocess.DEVNULL, env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    of_help = of_numpy = np.inf
    for number in range(40):
        of_help = min(of_help, work(ROOT / "cnn_vis.py", "--help"))
        of_numpy = min(of_numpy, work("-c", "import numpy"))
        if number >= 4 and of_help < 2 * of_numpy:
            break
    assert of_help < 2 * of_numpy


def test_the_script_alone_is_told_what_it_lacks(tmp_path):
    shutil.copy(ROOT / "cnn_vis.py", tmp_path)
    words = [sys.executable, tmp_path / "cnn_vis.py", "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(done, 2, "the folder cnn_vis_lib must lie beside cnn_vis.py")


def test_the_module_can_be_loaded_again_and_through_a_link(tmp_path):
    """Also where its folder is not on the path."""
    (tmp_path / "cnn_vis.py").symlink_to(ROOT / "cnn_vis.py")
    code = f"""if True:
        import importlib, sys
        sys.path = [p for p in sys.path if p != {str(ROOT)!r}]
        import cnn_vis
        importlib.reload(cnn_vis)
        del sys.modules["cnn_vis"]
        import cnn_vis
        print(cnn_vis.PARSER.parse_args(["--layer=a:0-9"]).target_layer)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("a:0-9\n", "")


@pytest.mark.parametrize("flags", [["-P"], ["-I"]])
def test_the_script_runs_where_its_folder_is_not_imported_from(flags, tmp_path):
    if sys.version_info < (3, 11) and "-P" in flags:
        pytest.skip("Python 3.10 has no -P")
    os.symlink(ROOT / "cnn_vis.py", tmp_path / "linked.py")
    words = [sys.executable, *flags, tmp_path / "linked.py", *ONE]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_short_help_fits_two_screens(tmp_path):
    text = run_process("--help", cwd=tmp_path, COLUMNS="100").stdout
    assert len(text.splitlines()) <= 60
    for name in ("--image", "--preset", "--layer", "--output", "--resume", "--help all"):
        assert name in text


def test_help_names_every_option_of_the_original(tmp_path):
    text = run_cli("--help", "all", cwd=tmp_path).stdout
    names = """
        deploy_txt caffe_model batch_size mean_image gpu image_type target_layer layer
        target_neuron initial_image image initialization_scale initialization_blur
        initial_size final_size num_sizes resize_type learning_rate decay_rate
        learning_rate_decay_iter learning_rate_decay_fraction learning_rate_decay_factor
        num_steps use_pixel_learning_rates amplify_l1_weight l1_weight amplify_l2_weight
        l2_weight amplify_grad_clip grad_clip alpha p_scale p_reg alpha_aux p_scale_aux
        p_reg_aux beta tv_reg tv_reg_scale tv_reg_step tv_reg_step_iter tv_grad_operator
        output_file output output_iter iter_behavior show_width show_height rescale_image
    """
    assert [name for name in names.split() if not re.search(rf"--{name}\s", text)] == []


def test_defaults_are_the_originals():
    o = cnn_vis.PARSER.parse_args([])
    assert (o.batch_size, o.image_type, str(o.target_layer), o.target_neuron) == (
        None,
        "amplify_layer",
        "inception_4d/3x3_reduce",
        0,
    )
    assert (o.initialization_scale, o.initialization_blur, o.num_sizes, o.resize_type) == (
        1.0,
        0.0,
        1,
        "geometric",
    )
    assert (
        o.learning_rate,
        o.decay_rate,
        o.learning_rate_decay_iter,
        o.learning_rate_decay_fraction,
    ) == (1.0, 0.95, 100, 1.0)
    assert (o.num_steps, o.use_pixel_learning_rates, o.rescale_image) == (1000, False, False)
    assert (o.amplify_l1_weight, o.amplify_l2_weight, o.amplify_grad_clip) == (1.0, 1.0, 5.0)
    assert (o.alpha, o.p_scale, o.p_reg, o.alpha_aux, o.p_scale_aux, o.p_reg_aux) == (
        6.0,
        1.0,
        1e-4,
        6.0,
        1.0,
        0.0,
    )
    assert (o.beta, o.tv_reg, o.tv_reg_scale, o.tv_reg_step, o.tv_reg_step_iter) == (
        2.0,
        0.5,
        1.0,
        0.0,
        50,
    )
    assert (o.tv_grad_operator, o.output_file, o.output_iter, o.iter_behavior) == (
        "naive",
        "out.png",
        50,
        {"save", "print"},
    )
    assert (o.show_width, o.show_height, o.initial_image, o.initial_size, o.final_size) == (
        5,
        5,
        None,
        None,
        None,
    )


def test_other_names_and_dashes_mean_the_same(picture, tmp_path):
    """The names of the original's README, and dashes, mean the same."""
    first = run_cli(
        *TINY,
        "--target_layer=inception_a/output",
        f"--initial_image={picture}",
        "--amplify_l1_weight=0.5",
        "--learning_rate_decay_fraction=0.5",
        "--learning_rate_decay_iter=1",
        "--num_steps=3",
        "--output_file=a.png",
        "--iter_behavior=none",
        cwd=tmp_path,
    )
    second = run_cli(
        *TINY,
        "--layer",
        "inception_a/output",
        "--image",
        picture,
        "--l1-weight",
        "0.5",
        "--learning-rate-decay-factor=0.5",
        "--learning-rate-decay-iter",
        "1",
        "--num-steps",
        "3",
        "--output",
        "b.png",
        "--iter-behavior",
        "none",
        cwd=tmp_path,
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert psnr(tmp_path / "a.png", tmp_path / "b.png") == np.inf


BAD = {
    "unknown option": (["--unheard_of=1"], ["--unheard_of", "--help"]),
    "mistyped option": (
        ["--lerning-rate=1"],
        ["did you mean --learning_rate?"],
    ),
    "not a number": (["--num_steps=many"], ["--num_steps", "many"]),
    "no steps": (["--num_steps=0"], ["--num_steps", "0", "at least 1"]),
    "nan": (["--tv_reg=nan"], ["--tv_reg", "nan", "finite"]),
    "infinity": (["--learning_rate=inf"], ["--learning_rate", "inf", "finite"]),
    "decay": (["--decay_rate=2"], ["--decay_rate", "2", "at most 1"]),
    "choice": (["--resize_type=cubic"], ["--resize_type", "cubic", "geometric"]),
    "mistyped choice": (["--preset=animal"], ["--preset animal", "did you mean animals?"]),
    "number as choice": (["--depth=12"], ["--depth 12", "8, 16"]),
    "behavior": (["--iter_behavior=save+dance"], ["--iter_behavior", "dance", "plot_pix"]),
    "behaviors without +": (["--iter_behavior=save,print"], ["'save,print'", "joined by +"]),
    "layer": (
        ["--layer=inception_a/outputs"],
        ["--layer", "inception_a/outputs", "inception_a/output"],
    ),
    "in-place layer": (
        ["--layer=inception_a/relu_1x1"],
        ["--layer", "inception_a/relu_1x1", "inception_a/1x1"],
    ),
    "data": (["--layer=data"], ["--layer", "data"]),
    "neuron": (
        ["--image_type=amplify_neuron", "--target_neuron=18"],
        ["--target_neuron", "18", "18 channels"],
    ),
    "no picture": (["--image=none.png"], ["--image", "none.png"]),
    "picture is a folder": (["--image=."], ["--image"]),
    "not a picture": ([f"--image={GOLDEN}/cases.json"], ["--image", "cases.json"]),
    "no weights": (
        ["--caffe_model=none.caffemodel"],
        ["--caffe_model", "none.caffemodel", "no such file"],
    ),
    "not weights": ([f"--caffe_model={GOLDEN}/input.png"], ["--caffe_model", "input.png"]),
    "not a prototxt": ([f"--deploy_txt={GOLDEN}/cases.json"], ["--deploy_txt", "cases.json"]),
    "binary prototxt": ([f"--deploy_txt={GOLDEN}/input.png"], ["--deploy_txt", "input.png"]),
    "not a mean": ([f"--mean_image={GOLDEN}/cases.json"], ["--mean_image", "cases.json"]),
    "size": (["--initial_size=big"], ["--initial_size", "big", "HEIGHTxWIDTH"]),
    "size without height": (["--initial_size=x"], ["--initial_size", "x"]),
    "negative size": (["--initial_size=x-1"], ["--initial_size", "x-1"]),
    "too low": (["--initial_size=31x90"], ["--initial_size", "31x90", "32x32"]),
    "too narrow": (["--initial_size=90x31"], ["--initial_size", "90x31", "32x32"]),
    "final too small": (["--num_sizes=2", "--final_size=8x8"], ["--final_size", "8x8"]),
    "output folder": (["--output=none/out.png"], ["--output", "none/out.png", "folder"]),
    "unknown field": (["--output={name}_{size}.png"], ["--output", "{size}", "{layer}"]),
    "option with a long dash": (["–num_steps", "1"], ["did you mean --num_steps?"]),
    "one dash": (["-output", "x.png"], ["-output", "did you mean --output?"]),
    "size in words": (["--final_size=xinf", "--num_sizes=2"], ["--final_size xinf", "not a size"]),
    "empty size": (["--initial_size="], ["--initial_size ''", "not a size"]),
    "table is a folder": (["--stats=new/"], ["--stats new/", "folder"]),
    "output format": (["--output=out.xyz"], ["--output", "out.xyz", ".png"]),
    "no such gpu": (["--gpu=99"], ["--gpu", "99"]),
    "gpus": (["--gpu=0,0"], ["--gpu", "0,0"]),
    "not a gpu": (["--gpu=fast"], ["--gpu", "fast"]),
    "model": (["--model=alexnet"], ["--model", "alexnet", "bvlc_googlenet"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line_and_write_nothing(case, picture, tmp_path):
    """Exit status 2 and one line with the option, the value and a remedy; nothing written."""
    arguments, words = BAD[case]
    done = run_cli(*QUICK, f"--image={picture}", *arguments, cwd=tmp_path)
    assert_one_line(done, 2, *words)
    assert os.listdir(tmp_path) == ["in.png"]


VALUE_OPTIONS = [
    action.option_strings[0]
    for action in cnn_vis.PARSER.options
    if action.nargs is None
    and action.dest
    not in ("download_model", "model_url", "resume", "reproduce", "output_file", "stats")
]


VALUES = st.one_of(
    st.text(max_size=12),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "0",
            "-1",
            "1e999",
            "0x0",
            "x0",
            "x-1",
            "axb",
            "1x",
            "x",
            "nan",
            "5x5x5",
            "",
            " ",
            "--",
            "é",
            "1_0",
            "x1e300",
            "99999999999x1",
            "0,1",
            "save+none",
            "x\x00y",
            "amplify_neuron",
            "inception_a/output",
        ]
    ),
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=st.lists(st.tuples(st.sampled_from(VALUE_OPTIONS), VALUES), min_size=1, max_size=4))
def test_any_values_are_accepted_or_one_line(values, capsys, monkeypatch, tmp_path_factory):
    """Whatever the values, a request that cannot be met gives one line and exit status 2, without a
    traceback. No workers are started: a request that gets that far counts as valid."""

    def refuse(*_, **__):
        raise cnn_vis.RunFailed("as far as this test goes")

    monkeypatch.setattr("cnn_vis_lib.engines.Workers", refuse)
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    status = cnn_vis.main(
        [
            *TINY,
            f"--image={GOLDEN}/input.png",
            "--quiet",
            *(f"{name}={value}" for name, value in values),
        ]
    )
    said = capsys.readouterr().err
    assert status in (1, 2), said
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said


def test_options_without_effect_name_what_is_missing():
    options = cnn_vis.PARSER.parse_args(["--background=red", "--web_port=8000"])
    assert [*cnn_vis.PARSER.without_effect(options)] == [
        "--background has no effect without --image",
        "--web_port has no effect without web in --iter_behavior",
    ]


def test_options_without_effect_are_told(tmp_path):
    """Told, and the picture is made."""
    done = run_cli(
        *TINY,
        "--layer=inception_a/output",
        f"--image={GOLDEN}/input.png",
        "--final_size=x2",
        "--target_neuron=3",
        "--seed=4",
        "--p_reg=0",
        "--alpha=3",
        "--num_steps=1",
        cwd=tmp_path,
    )
    assert done.returncode == 0
    for name in ("final_size", "target_neuron", "seed", "alpha"):
        assert f"--{name} has no effect with" in done.stderr
    words = [
        "--num_steps=40",
        "--tv_reg_step=1",
        "--learning_rate_decay_fraction=.5",
        "--iter_behavior=save",
    ]
    told = list(cnn_vis.PARSER.without_effect(cnn_vis.PARSER.parse_args(words)))
    assert [line.split()[0] for line in told] == [
        "--learning_rate_decay_fraction",
        "--tv_reg_step",
        "--iter_behavior",
    ]
    words[0] = "--num_steps=101"
    assert not list(cnn_vis.PARSER.without_effect(cnn_vis.PARSER.parse_args(words)))


def test_names_of_files_that_exist_are_taken_literally(tmp_path):
    folder = tmp_path / "a$HOME ~"
    folder.mkdir()
    shutil.copy(GOLDEN / "input.png", folder / "$HOME.png")
    words = [*QUICK, "--image=$HOME.png", f"--output={folder}/out.png", "--iter_behavior=none"]
    assert run_cli(*words, cwd=folder).returncode == 0
    assert sorted(os.listdir(folder)) == ["$HOME.png", "out.png"]


def test_paths_are_expanded(tmp_path):
    """All of them alike, also where the shell did not do it, as in --output=~/o.png."""
    done = run_cli(
        *ONE,
        "--output=~/o.png",
        "--stats=$PLACE/s.csv",
        cwd="/",
        HOME=str(tmp_path),
        PLACE=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["o.png", "s.csv"]


@pytest.mark.parametrize(
    "name",
    ["resume", "reproduce", "stats", "caffe_model", "deploy_txt", "mean_image", "image", "output"],
)
def test_empty_values_are_refused(name, tmp_path):
    assert_one_line(run_cli(*ONE, f"--{name}=", cwd=tmp_path), 2, name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "option", ["num_steps", "num_sizes", "output_iter", "checkpoint_iter", "seed", "workers", "gpu"]
)
def test_numbers_of_400_digits_are_refused(option, tmp_path):
    assert_one_line(run_cli(*ONE, f"--{option}={'9' * 400}", cwd=tmp_path), 2, f"--{option}")


@pytest.mark.parametrize("value", ["-1e-4", "-.5", "-2", "-1.5e3"])
def test_negative_numbers_are_values(value, tmp_path):
    assert run_cli(*ONE, "--amplify_l1_weight", value, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("option", ["--image", "--initial-image", "--output", "--caffe_model"])
def test_a_name_that_looks_like_an_option_is_taken_with_an_equals_sign(option, tmp_path):
    done = run_cli(*ONE, option, "-foo.png", cwd=tmp_path)
    assert_one_line(done, 2, "write --", "=-foo.png")
    assert_one_line(run_cli(*ONE, option, cwd=tmp_path), 2, "expected one argument", "--help")


def test_a_python_without_the_packages_is_told_which_one_has_them(tmp_path):
    """Whichever package it is that is missing."""
    path = shutil.copy(ROOT / "cnn_vis.py", tmp_path)
    shutil.copytree(ROOT / "cnn_vis_lib", tmp_path / "cnn_vis_lib")
    bare = [sys.executable, "-S", "-E", str(path)]
    done = subprocess.run([*bare, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(done, 2, "lacks numpy", sys.executable, f"-r {tmp_path}/requirements.txt")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True)
    assert_one_line(done, 2, "lacks numpy", f"run cnn_vis.py with {tmp_path}/.venv/bin/python")
    (tmp_path / "missing" / "PIL").mkdir(parents=True)
    code = "raise ModuleNotFoundError('no', name='PIL')"
    (tmp_path / "missing" / "PIL" / "__init__.py").write_text(code)
    done = run_cli(*ONE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "missing"))
    assert_one_line(done, 2, "lacks PIL", "requirements.txt")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_options_are(name):
    """Other options override it, in any order; the recorded command lists its options instead of
    its name."""

    def parsed(words):
        return vars(cnn_vis.PARSER.parse_args(words))

    words = [*PRESETS[name].options.split(), "--image=in.jpg", "--output=out.png"]
    expected = parsed([*words, "--num_steps=3"]) | {"preset": name}
    for given_words in (
        ["--num_steps=3", f"--preset={name}", *words[-2:]],
        [*words[-2:], "--pres", name, "--num-steps", "3"],
    ):
        assert parsed(given_words) == expected
    kept = cnn_vis.PARSER.words(cnn_vis.PARSER.parse_args([f"--preset={name}", *words[-2:]]))
    assert parsed(kept) == parsed(words)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--final_size=300"], "initial_size", "300"),
        (["--final_size=200x300"], "initial_size", "200x300"),
        (["--final_size=x2"], "initial_size", "450"),
        (["--final_size=300", "--initial_size=400"], "initial_size", "400"),
        (["--final_size=5000"], "initial_size", "450"),
        (["--target_neuron=3"], "image_type", "amplify_neuron"),
        (["--target_neuron=3", "--image_type=amplify_layer"], "image_type", "amplify_layer"),
        ([], "output_file", "in_example7.png"),
        (["--output=a.png"], "output_file", "a.png"),
    ],
)
def test_a_preset_fits_what_is_given_with_it(words, name, value):
    words = ["--preset=example7", "--image=pictures/in.jpg", *words]
    assert getattr(cnn_vis.PARSER.parse_args(words), name) == value


@pytest.mark.parametrize(
    "words", [["in.jpg"], ["in.jpg", "--num_steps=3"], ["--num_steps=3", "in.jpg"]]
)
def test_a_word_of_its_own_is_the_picture(words):
    assert cnn_vis.PARSER.parse_args(words).initial_image == "in.jpg"
    many = cnn_vis.PARSER.parse_args([*words, "other.jpg", "--output=fold/"])
    assert many.initial_image == ["in.jpg", "other.jpg"]


def test_a_preset_for_photographs_asks_for_one(tmp_path):
    done = run_cli("--preset=dream", cwd=tmp_path)
    assert_one_line(done, 2, "--preset dream", "photographs", "--image")
    assert os.listdir(tmp_path) == []


def test_a_preset_for_photographs_needs_none_for_lists(tmp_path):
    done = run_cli(*TINY, "--preset=dream", "--list_layers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "inception_a/output" in done.stdout


@pytest.mark.parametrize("word", ["1", "b", "+", "0.5", "–num_steps"])
def test_a_word_that_is_no_file_is_no_picture(word, tmp_path):
    assert_one_line(run_cli(*QUICK, word, cwd=tmp_path), 2, f"unrecognized arguments: {word}")


def test_without_options_three_commands_are_shown(tmp_path):
    (tmp_path / "out.png").write_bytes(b"my first dream")
    done = run_cli(cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("cnn_vis.py --") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"my first dream"


def test_presets_are_listed_as_options(tmp_path):
    lines = run_cli("--list_presets", cwd=tmp_path).stdout.splitlines()
    assert len(lines) == 2 * len(PRESETS)
    for about, words in zip(lines[::2], lines[1::2]):
        name, _, about = about.partition(" ")
        assert about.strip() == PRESETS[name].about
        assert words.split() == PRESETS[name].options.split()


def test_options_come_from_a_file_too(tmp_path):
    """Several in a line, quoted as in a shell, with dashes, with comments, and files in files."""
    (tmp_path / "inner").write_text("--num-steps 1   # a quick one\n")
    (tmp_path / "options").write_text(
        "\ufeff# for a trial\n--layer=inception_a/output --initial-size 32x32\n"
        "@inner\n--output 'my own.png'\n"
    )
    done = run_cli(*TINY, "--iter_behavior=none", "@options", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my own.png").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["@options", "No such file"]),
        ("--output 'a", ["quotation"]),
        ("@./options", ["@./options", "itself"]),
        ("--output 'café'".encode("utf-16"), ["@options", "UTF-8"]),
    ],
)
def test_files_of_options_that_cannot_be_are_one_line(text, words, tmp_path):
    if text:
        content = text.encode() if isinstance(text, str) else text
        (tmp_path / "options").write_bytes(content)
    assert_one_line(run_cli(*TINY, "@options", cwd=tmp_path), 2, *words)


def test_files_of_options_can_be_pipes(tmp_path):
    """Which can be read only once, though a preset makes the options be read again."""
    words = [sys.executable, ROOT / "cnn_vis.py", *QUICK, "@/dev/stdin"]
    text = f"--image={GOLDEN}/input.png --preset=soft --layer=inception_a/output --num_steps=1"
    done = subprocess.run(words, input=text, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = run_cli("--reproduce=input_soft.png", cwd=tmp_path).stdout
    assert command.startswith("python cnn_vis.py --preset=soft --image=")  # what is not in it
    assert "--layer=inception_a/output --num_steps=1" in command
    assert "--step_rule" not in command
    command = run_cli("--reproduce=input_soft.png", "--verbose", cwd=tmp_path).stdout
    assert "--num_steps=1 " in command
    assert "--step_rule=mean" in command  # the preset's


def test_threads_do_not_mix_up_their_options():
    """As calls of dream() in several threads would show."""

    def parsed(number):
        words = [f"--image={number}.jpg", f"--workers={number}", "--preset=dream"]
        return [cnn_vis.PARSER.parse_args(words) for _ in range(30)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(parsed, range(1, 9)))
    finally:
        sys.setswitchinterval(interval)
    for number, options in enumerate(found, 1):
        assert {(o.initial_image, o.workers) for o in options} == {(f"{number}.jpg", number)}
