"""One configuration: a YAML file, flags over it, errors of one line, and a resolved tree that reads back."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar_megatron.config import (
    FIELDS,
    SECTIONS,
    Config,
    build_config,
    check_world_size,
    flag,
    load_config,
    parse_config,
)
from tidar_megatron.config.checks import shortest_fraction
from tidar_megatron.errors import UserError


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_the_file_and_both_are_typed(tmp_path):
    path = write(tmp_path, "optimizer:\n  lr: 3e-4\n  min_lr: 1e-5\nmodel:\n  num_layers: 6\n")
    config = parse_config(["--config", path, "--lr", "1e-3", "--no-qk-layernorm", "--overlap-grad-reduce"])
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.min_lr == 1e-5  # PyYAML reads 1e-5 as a string
    assert config.model.num_layers == 6
    assert config.parallel.overlap_grad_reduce is True
    assert config.model.qk_layernorm is False


def test_the_resolved_tree_reads_back(tmp_path):
    config = parse_config(["--lr", "0.003", "--train-data", "x", "--block-size", "4", "--seq-length", "12"])
    assert load_config(write(tmp_path, config.to_yaml())) == config


@pytest.mark.parametrize(
    ("written", "flags", "words"),
    [
        ("a", "a", ("a",)),
        ("[0.7, a, 3, b]", "0.7 a 3 b", ("0.7", "a", "3", "b")),
        ("[a]", "a", ("a",)),
    ],
)
def test_data_are_a_path_or_a_blend(tmp_path, written, flags, words):
    """In the file as in flags, and in the resolved tree that reads back."""
    path = write(tmp_path, f"data:\n  train_data: {written}\n  valid_data: null\n")
    config = load_config(path)
    assert (config.data.train_data, config.data.valid_data) == (words, ())
    assert parse_config(["--train-data", *flags.split(), "--seq-length", "64"]).data.train_data == words
    assert load_config(write(tmp_path, config.to_yaml())) == config


def test_switches_of_packing():
    """On by default, both: positions begin anew with each document, and nothing attends across them."""
    config = parse_config([])
    assert config.data.reset_positions and not config.data.cross_document_attention
    config = parse_config(["--no-reset-positions", "--no-cross-document-attention"])
    assert not config.data.reset_positions and not config.data.cross_document_attention
    assert parse_config(["--cross-document-attention"]).data.cross_document_attention


def test_every_field_is_a_flag_with_help():
    for name, section in FIELDS.items():
        field = next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == name)
        assert field.metadata["help"], flag(name)


def test_megatrons_and_tidars_own_names():
    for name in (
        "--tensor-model-parallel-size --pipeline-model-parallel-size --transformer-impl --micro-batch-size "
        "--global-batch-size --seq-length --train-iters --lr --lr-decay-style --save --load --save-interval "
        "--wandb-project --block-size --ar-loss-weight --mask-token-id --ar-warmup-fraction --init-from --valid-data"
    ).split():
        assert name[2:].replace("-", "_") in FIELDS, name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer:\n  lrr: 1\n", "optimizer.lrr: unknown key (did you mean 'lr'?)"),
        ("optimizer:\n  learning_rate: 1\n", "optimizer.learning_rate: unknown key (did you mean 'lr'?)"),
        ("optimiser:\n  lr: 1\n", "optimiser: unknown key (did you mean 'optimizer'?)"),
        ("data:\n  seq_length: long\n", "data.seq_length (--seq-length): Input should be a valid integer"),
        ("data:\n  seq_length: 16.5\n", "data.seq_length (--seq-length): Input should be a valid integer"),
        ("training:\n  bf16: 3.5\n", "training.bf16 (--bf16): Input should be a valid boolean"),
        (
            "optimizer:\n  lr_decay_style: exp\n",
            "(--lr-decay-style): Input should be 'constant'",
        ),
        ("model:\n  num_layers: true\n", "model.num_layers (--num-layers): is not a switch, got True"),
        (
            "checkpoint:\n  save: yes\n",
            "checkpoint.save (--save): is not a switch, got True; YAML reads an unquoted yes",
        ),
        ("model:\n  seq_length: 8\n", "model.seq_length: unknown key (did you mean 'seq_length' in section 'data'?)"),
        ("optimizer:\n  lr: 1\n  lr: 2\n", "'lr' appears twice, the second time on line 3"),
        ("model: {}\noptimizer: {}\nmodel:\n  num_layers: 2\n", "'model' appears twice, the second time on line 3"),
        ("logging:\n  wandb_exp_name: 2024-13-45\n", "not YAML: month must be in 1..12"),
        ("optimizer:\n  lr: -1\n", "optimizer.lr (--lr): Input should be greater than or equal to 0"),
        ("optimizer:\n  lr: .nan\n", "optimizer.lr (--lr): Input should be a finite number"),
        ("model:\n  norm_epsilon: 0\n", "model.norm_epsilon (--norm-epsilon): Input should be greater than 0"),
        ("model: 3\n", "model: "),
        ("- a\n", "must hold sections"),
        ("model: [\n", "not YAML"),
    ],
)
def test_errors_of_the_file_name_the_key(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        parse_config(["--config", path])
    assert said in str(error.value)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lrr", "1"], "unknown flag --lrr (did you mean --lr?)"),
        (["--learning-rate", "1"], "unknown flag --learning-rate (did you mean --lr?)"),
        (["--resume", "1"], "unknown flag --resume; --help lists them all"),
        (["--frobnicate", "1"], "unknown flag --frobnicate"),
        (["--seq-length", "x"], "data.seq_length"),
        (["--lr"], "expected one argument"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--block-size", "0"], "--block-size 0: must be at least 1"),
        (["--seq-length", "100"], "--seq-length 100: must be a multiple of 8 (--block-size 8); nearest: 96"),
        (["--seq-length", "3"], "nearest: 8"),
        (
            "--sequence-parallel --tensor-model-parallel-size 16 --num-attention-heads 16 --hidden-size 1024 "
            "--seq-length 1000".split(),
            "must be a multiple of 16 (--block-size 8, and --tensor-model-parallel-size 16); nearest: 992",
        ),
        ("--num-attention-heads 6 --num-query-groups 4".split(), "--num-query-groups 4: must divide"),
        ("--adam-beta2 1".split(), "(--adam-beta2): Input should be less than 1"),
        ("--seed 4294967296".split(), "(--seed): Input should be less than or equal to 2147483648"),
        ("--lr-warmup-fraction 1".split(), "--lr-warmup-fraction 1: is 1000 steps, which must be less than the 1000"),
        (
            "--lr-decay-style WSD --lr-wsd-decay-iters 991 --lr-warmup-iters 10".split(),
            "--lr-wsd-decay-iters 991: the decay would begin before --lr is reached; nearest: 990",
        ),
        ("--init-mask-token mean".split(), "--init-mask-token: needs --init-from"),
        ("--recompute-granularity selective --recompute-modules moe".split(), "moe: needs --num-experts"),
        ("--rope-scaling-type llama3 --rope-low-freq-factor 4".split(), "--rope-low-freq-factor 4: must be less than"),
        ("--num-attention-heads 7".split(), "--hidden-size 768: must be a multiple of --num-attention-heads 7"),
        (
            "--diffusion-block-fraction 0".split(),
            "(--diffusion-block-fraction): Input should be greater than 0",
        ),
        (
            "--diffusion-block-fraction 1.01".split(),
            "(--diffusion-block-fraction): Input should be less than or equal to 1",
        ),
        (
            "--ar-loss-weight -1".split(),
            "(--ar-loss-weight): Input should be greater than or equal to 0",
        ),
        (
            "--ar-warmup-fraction 1.5".split(),
            "(--ar-warmup-fraction): Input should be less than or equal to 1",
        ),
    ],
)
def test_errors_of_the_command_line(flags, said):
    with pytest.raises(UserError) as error:
        parse_config(flags)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


SHORT = {  # longest first: VPP before PP
    "VPP": "--virtual-pipeline-model-parallel-size",
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "CP": "--context-parallel-size",
    "EP": "--expert-model-parallel-size",
}
IMPOSSIBLE_LAYOUTS = [  # over 12 layers, 12 heads, 4 groups, S = 1024, B = 8, a global batch of 16, on 8 processes
    ("TP 3", "TP 3: must divide --num-query-groups 4; nearest: TP 2"),
    ("TP 8", "TP 8: must divide --num-attention-heads 12; nearest: TP 4"),
    ("TP 4 --ffn-hidden-size 2050", "must divide --ffn-hidden-size 2050; nearest: TP 2"),
    ("PP 5", "PP 5: must divide --num-layers 12; nearest: PP 4"),
    ("PP 4 VPP 4", "PP 4 x VPP 4: must divide --num-layers 12; nearest: PP 4 VPP 3"),
    ("VPP 2", "VPP 2: interleaves pipeline stages, but there is only one; leave it out, or give PP 2"),
    ("--seq-length 1028", "--seq-length 1028: must be a multiple of 8 (--block-size 8); nearest: 1024"),
    ("CP 4 --seq-length 1032", "must be a multiple of 64 (2 x CP 4 x --block-size 8); nearest: 1024"),
    ("TP 4 PP 4", "needs a multiple of 16 processes, but there are 8; try torchrun --nproc-per-node 16"),
    ("CP 16", "needs a multiple of 16 processes, but there are 8"),
    ("PP 3", "needs a multiple of 3 processes, but there are 8; try torchrun --nproc-per-node 6"),
    ("--sequence-parallel", "needs TP 2 or more; or leave it out"),
    ("--overlap-param-gather", "needs --use-distributed-optimizer"),
    ("--overlap-param-gather --use-distributed-optimizer", "needs --overlap-grad-reduce"),
    ("--global-batch-size 12", "must be a multiple of --micro-batch-size 1 x 8 data-parallel ranks; nearest: 16"),
    ("PP 4 VPP 3 --global-batch-size 12", "x 2 data-parallel ranks x 4 interleaved pipeline stages; nearest: 16"),
    ("EP 2", "EP 2: there are no experts to distribute"),
    ("--num-experts 6 EP 4", "EP 4: must divide --num-experts 6; nearest: EP 3"),
    ("--num-experts 4 EP 4 PP 4", "needs a multiple of 16 processes"),
    ("--num-experts 4 --moe-router-topk 5", "must be from 2 to 4 (--num-experts); nearest: 4"),
    ("--num-experts 4 --moe-router-topk 1", "nearest: 2"),
    ("--hidden-size 36 --num-query-groups 12", "--num-attention-heads 12: channels of a head 3: must be even"),
    ("--num-experts 4 TP 2", "megatron-core also needs --sequence-parallel"),
    ("--recompute-granularity selective --recompute-modules layernorm", "needs --transformer-impl transformer_engine"),
    ("--num-experts 4 --recompute-granularity selective --recompute-modules mlp", "nearest: --recompute-modules moe"),
    (
        "CP 4 --diffusion-block-fraction 0.3",
        "38 of 128 blocks, which must be a multiple of 8 (2 x CP 4); nearest: 0.31",
    ),
    ("CP 2 --diffusion-block-fraction 0.001", "is 1 of 128 blocks, which must be a multiple of 4"),
    (
        "TP 4 --sequence-parallel --seq-length 72 --block-size 6 --diffusion-block-fraction 0.25",
        "is 3 of 12 blocks, which must be a multiple of 2 (TP 4); nearest: 0.3",
    ),
    (
        "CP 2 TP 4 --sequence-parallel --seq-length 72 --block-size 3 --diffusion-block-fraction 0.5",
        "is 12 of 24 blocks, which must be a multiple of 8 (2 x CP 2, and TP 4); nearest: 0.67",
    ),
    ("--moe-grouped-gemm", "needs --transformer-impl transformer_engine"),
]


def spelled_out(text):
    return re.sub("|".join(SHORT), lambda match: SHORT[match.group()], text)


@pytest.mark.parametrize(("flags", "said"), IMPOSSIBLE_LAYOUTS)
def test_impossible_layouts_name_the_nearest_that_works(flags, said):
    flags = "--num-query-groups 4 --global-batch-size 16 " + spelled_out(flags)
    with pytest.raises(UserError) as error:
        check_world_size(parse_config(flags.split()), 8)
    assert spelled_out(said) in str(error.value)
    assert "\n" not in str(error.value)


def mend(flags, world_size, message):
    """Do what a refusal says: ``flags`` is a dict of flag -> value (None for a switch)."""
    flags, wrong = dict(flags), re.match(r"--[a-z-]+", message).group()
    if found := re.search(r"try torchrun --nproc-per-node (\d+)", message):
        return flags, int(found.group(1))
    if found := re.search(r"nearest: ([\d.e-]+)$", message):
        flags[wrong] = found.group(1)
    elif found := re.search(r"nearest: (--.*)$", message):
        given, _, without = found.group(1).partition(" without ")
        words = given.split()
        flags |= dict(zip(words[::2], words[1::2], strict=True))
        flags.pop(without, None)
    elif "leave it out" in message:
        flags.pop(wrong)
    elif found := re.search(r"give (--[a-z-]+) (\d+)$", message):
        flags[found.group(1)] = found.group(2)
    else:
        flags[re.search(r"needs (--[a-z-]+)", message).group(1)] = None
    return flags, world_size


def remedies_until_accepted(flags, world_size):
    """How many remedies it takes until the configuration is accepted."""
    seen = []
    for rounds in range(20):  # one for each thing that is wrong: 12 have been met
        assert (flags, world_size) not in seen, "the remedies go in a circle"
        seen.append((flags, world_size))
        words = [word for flag, value in flags.items() for word in (flag, value) if word is not None]
        try:
            check_world_size(parse_config(words), world_size)
        except UserError as error:
            flags, world_size = mend(flags, world_size, str(error))
        else:
            return rounds
    raise AssertionError(flags)


@pytest.mark.parametrize("flags", [flags for flags, _ in IMPOSSIBLE_LAYOUTS])
def test_following_the_remedy_works(flags):
    text = spelled_out("--num-query-groups 4 --global-batch-size 16 " + flags)
    given = {flag: value or None for flag, value in re.findall(r"(--[a-z-]+)(?: ([\w.]+))?", text)}
    assert 1 <= remedies_until_accepted(given, 8) <= 4


counts = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12, 16])


@pytest.mark.slow
@settings(deadline=None)
@given(
    sizes=st.fixed_dictionaries(dict.fromkeys([*SHORT.values(), "--num-layers", "--num-query-groups"], counts)),
    multiple=st.integers(1, 4),
    lengths=st.tuples(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.integers(1, 4)),
    experts=st.one_of(st.none(), st.integers(1, 9)),
    etp=st.integers(1, 4),
    switches=st.sets(st.sampled_from(["--sequence-parallel", "--overlap-param-gather", "--use-distributed-optimizer"])),
    fraction=st.floats(0, 1, exclude_min=True),
    world_size=st.integers(1, 24),
)
def test_remedies_lead_to_a_layout_that_works(sizes, multiple, lengths, experts, etp, switches, fraction, world_size):
    flags = {**sizes, "--num-attention-heads": sizes["--num-query-groups"] * multiple, "--kv-channels": 16}
    flags |= {"--expert-tensor-parallel-size": etp, "--diffusion-block-fraction": fraction}
    names = ("--seq-length", "--block-size", "--global-batch-size", "--micro-batch-size")
    flags |= dict(zip(names, lengths, strict=True))
    if experts is not None:
        flags["--num-experts"] = experts
    written = {flag: str(value) for flag, value in flags.items()} | dict.fromkeys(sorted(switches))
    remedies_until_accepted(written, world_size)


def test_lists_of_modules():
    config = parse_config("--recompute-granularity selective --recompute-modules core_attn mlp".split())
    assert config.parallel.recompute_modules == ("core_attn", "mlp")
    with pytest.raises(UserError, match=r"recompute_modules.*'attn'"):
        parse_config("--recompute-modules attn".split())


def test_defaults_stand():
    assert build_config({}) == Config()


@pytest.mark.slow
@given(st.integers(1, 5000), st.data())
def test_a_fraction_of_the_blocks(blocks, data):
    """The nearest whole number of blocks and at least one; a remedy names any number in as few digits as will do."""
    chosen = data.draw(st.integers(1, blocks))
    text = shortest_fraction(chosen, blocks)
    assert len(text) <= 8
    for fraction, expected in ((text, chosen), (1.0, blocks), (1e-9, 1)):
        tidar = {"block_size": 1, "diffusion_block_fraction": fraction}
        config = build_config({"tidar": tidar, "data": {"seq_length": blocks}})
        assert (config.blocks, config.chosen_blocks) == (blocks, expected)


def test_mlp_of_experts_is_refused_only_where_it_is_asked_for():
    experts = "--num-experts 4 --recompute-modules mlp".split()
    parse_config(experts)  # nothing is recomputed at all
    with pytest.raises(UserError, match="--recompute-modules mlp"):
        parse_config([*experts, "--recompute-granularity", "selective"])
    parse_config("--num-experts 4 --recompute-modules moe core_attn --recompute-granularity selective".split())
    parse_config("--recompute-modules mlp --recompute-granularity selective".split())
