"""Released world files in, the published numbers out."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import wmpo_gym  # noqa: F401 (registers the environments)
from wmpo_gym.convert.published import dead_layout, published_layout
from wmpo_gym.convert.released import RELEASED_TASKS, Sourced, released_task
from wmpo_gym.convert.world import convert_world
from wmpo_gym.utils.io import ArtifactError
from wmpo_gym.world.networks.stdit import CONFIGS, STDiT
from wmpo_gym.world.world import World

PREDICTED = slice(4, 12)


def close(actual, expected, atol=3e-6):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.fixture
def convert(release, tmp_path):
    def run(**settings) -> World:
        convert_world(release.files, tmp_path / "world", release.task.asked(**settings), **release.sizes)
        return World.from_pretrained(tmp_path / "world")

    return run


# -- parity ------------------------------------------------------------------------------------------------
def test_velocity_of_a_converted_world(convert, golden):
    tensors, _ = golden("stdit3_tiny")
    network = convert().network
    for case, time in (("sq_ta", "t_a"), ("sq_tb", "t_b")):
        with torch.no_grad():
            velocity = network(
                tensors["in.latents_sq"],
                tensors[f"in.{time}"],
                tensors["in.actions"],
                ~tensors["in.x_mask"],
            )
        close(velocity[:, :, PREDICTED], tensors[f"{case}.output"][:, :4, PREDICTED])


def test_sampler_of_a_converted_world(convert, golden):
    tensors, _ = golden("rflow")
    imagination, z = convert().imagination(), tensors["sample.z"]
    assert imagination.nfe_per_chunk == 30
    with torch.no_grad():
        chunk = imagination.flow.sample(
            imagination.network,
            z[:, :, 4:],
            z[:, :, :4],
            tensors["sample.actions"],
            imagination.nfe_per_chunk,
        )
    close(chunk, tensors["s30.z_final"][:, :, 4:])


def test_loss_of_a_converted_world(convert, golden):
    tensors, _ = golden("rflow")
    imagination = convert().imagination()
    x, noise, t, actions = (tensors[f"train.{name}"] for name in ("x_start", "noise", "t", "actions"))
    losses = imagination.flow.loss(
        imagination.network, x, actions, ~tensors["train.x_mask"], timestep=t, noise=noise
    )
    close(losses, tensors["train.loss_per_sample"])


def test_classifier_of_a_converted_world(convert, golden):
    tensors, _ = golden("reward_model_tiny")
    classifier = convert().classifier
    with torch.no_grad():
        logits = classifier(tensors["in.pixel_values"], torch.zeros(3, dtype=torch.long))
    close(logits, tensors["logits"])
    assert classifier.threshold == 0.82 and classifier.image_mean == (0.485, 0.456, 0.406)


def test_autoencoder_of_a_converted_world(convert, release):
    from diffusers import AutoencoderKL

    frames = torch.randint(0, 256, (1, 2, 64, 64, 3), dtype=torch.uint8)
    published, ours = AutoencoderKL.from_pretrained(release.files.autoencoder), convert().autoencoder
    with torch.no_grad():
        mode = published.encode(frames[0].movedim(-1, 1) / 127.5 - 1).latent_dist.mode()
        pixels = published.decode(mode).sample
    latents = ours.encode(frames)
    close(latents[0].transpose(0, 1), 0.13025 * mode, atol=1e-6)
    expected = ((pixels * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8).movedim(1, -1)
    assert (ours.decode(latents)[0].int() - expected.int()).abs().max() <= 1  # truncation at a whole level


def test_old_names_of_the_autoencoder(convert, release):
    file = release.files.autoencoder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = dict(state)
    for new_part, old_part in old.items():
        renamed = {name.replace(new_part, old_part): value for name, value in renamed.items()}
    assert sum(name not in state for name in renamed) == 16  # two attentions of four layers
    save_file(renamed, file)
    after = convert().autoencoder.vae.state_dict()
    assert set(after) == set(state) and all(torch.equal(after[name], state[name]) for name in state)


# -- what goes along ---------------------------------------------------------------------------------------
def test_settings_come_from_the_table(convert, release):
    world = convert()
    assert world.config.context_frames == 4 and world.config.denoising_steps == 30
    assert world.config.context_noise == 0.015 and not world.config.round_timesteps
    task = world.task
    assert (task.name, task.horizon, task.chunk, task.action_dim) == ("coffee", 256, 8, 7)
    assert task.instructions == ("coffee",) and task.success_tolerance_px == 0.0
    assert task.action_low == (-0.6, -0.45, -0.9, -0.11, -0.2, -0.75, -1.0)
    assert world.start_frames.ids.tolist() == [0, 2, 10]  # by number, not by spelling
    assert list(task.split_ids("train")) == list(range(11)) and not task.split_ids("test")
    settings = world.card["converted"]["settings"]
    assert settings["threshold"] == {
        "value": 0.82,
        "source": "examples/mimicgen/coffee/train_wmpo_128.sh (rm_threshold)",
    }
    assert str(release.root) not in json.dumps(world.card)


def test_a_converted_world_is_an_environment(convert, tmp_path, monkeypatch):
    convert()
    env = gymnasium.make("WMPO-Imagined-v0", world=str(tmp_path / "world"))
    obs, info = env.reset(seed=0, options={"start_state_id": 10})
    assert obs["pixels"].shape == (64, 64, 3) and info["instruction"] == "coffee"
    assert env.action_space.shape == (8, 7)
    _, _, _, _, info = env.step(np.zeros((8, 7), np.float32))
    assert info["nfe"] == 30 and 0 < info["success_prob"] < 1
    env.close()


@pytest.mark.parametrize(("noise", "told"), [(None, 15.0), (0.05, 50.0)])
def test_both_conventions_of_context_noise(convert, noise, told):
    """The release says 15 of 1000 diffusion steps, the paper 50."""
    imagination, times = convert(context_noise=noise).imagination(), []
    imagination.network.t_embedder.register_forward_pre_hook(lambda _m, args: times.append(args[0]))
    state = imagination.start(np.zeros((1, 64, 64, 3), np.uint8))
    imagination.nfe_per_chunk = 1
    imagination.step(state, np.zeros((1, 8, 7), np.float32), np.zeros((1, 4, 8, 8, 8), np.float32))
    close(torch.cat(times), torch.tensor([told, 1000.0]), atol=1e-4)
    latents, clean = torch.ones(1, 4, 12, 1, 1), torch.zeros(1, 4, 12, 1, 1)
    mask = (torch.arange(12) < 4).expand(1, -1)
    noised = imagination.flow.corrupt(clean, latents, torch.tensor([700.0]), mask)[0, 0, :, 0, 0]
    close(noised, torch.tensor([told / 1000] * 4 + [0.7] * 8), atol=1e-7)


@pytest.mark.parametrize("rounded", [True, False])
def test_timesteps_rounded_to_bfloat16(rounded, convert, golden):
    imagination, times = convert(round_timesteps=rounded).imagination(), []
    imagination.network.t_embedder.register_forward_pre_hook(lambda _m, args: times.append(args[0]))
    state = imagination.start(np.zeros((1, 64, 64, 3), np.uint8))
    imagination.step(state, np.zeros((1, 8, 7), np.float32), np.zeros((1, 4, 8, 8, 8), np.float32))
    expected = golden("rflow")[0]["grid30.as_bf16" if rounded else "s30.timesteps"]
    assert torch.equal(torch.cat(times)[1:], expected)  # after that of the context


def test_a_release_in_bfloat16_stays_as_it_is(convert, release, golden, tmp_path):
    for shard in release.files.network.glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(shard).items()}, shard)
    network = convert().network
    with safe_open(tmp_path / "world/network/diffusion_pytorch_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    tensors, _ = golden("stdit3_tiny")
    weight = tensors["state.t_block.1.weight"].bfloat16().float()
    assert torch.equal(network.t_block[1].weight, weight)  # computed with in float32
    assert torch.equal(network.rope_freqs, golden("stdit3_tiny_bf16")[0]["rope.freqs_bf16"])


def test_the_other_normalisation_by_option(convert):
    assert convert(classifier_normalisation="half").classifier.image_std == (0.5, 0.5, 0.5)


def test_every_setting_has_a_source():
    assert set(RELEASED_TASKS) == {"coffee", "square", "stack-three", "three-piece-assembly"}
    for task in RELEASED_TASKS.values():
        settings = task.to_dict()
        assert len(settings) == 15
        for setting in settings.values():
            assert setting["value"] is not None and len(setting["source"]) > 10
    chunks = [RELEASED_TASKS[n].horizon.value // 8 for n in RELEASED_TASKS]
    assert chunks == [32, 23, 40, 48]
    assert released_task("stack_three") is released_task("stack-three")
    assert released_task("square").prompt.value == "insert the square into the stick"
    with pytest.raises(ValueError, match="No released task 'lift'; choose one of coffee, square"):
        released_task("lift")


# -- published size ----------------------------------------------------------------------------------------
def test_published_size_on_the_meta_device():
    with torch.device("meta"):
        network = STDiT(**CONFIGS["xl"])
    live, dead = published_layout(network), dead_layout(network)
    count = {name: int(np.prod(shape)) for name, shape in (live | dead).items()}
    assert sum(count[name] for name in live) - count["rope.freqs"] == 907_789_856
    assert sum(count.values()) - count["y_embedder.y_embedding"] == 1_212_991_556  # that one is a buffer

    def linear(*names):
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    expected = linear("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1")
    expected |= linear("action_embedder.fc.0", "action_embedder.fc.2", "fps_embedder.mlp.0")
    expected |= linear("fps_embedder.mlp.2", "y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2")
    expected |= linear("final_layer.linear") | {"final_layer.scale_shift_table", "rope.freqs"}
    expected |= {"action_embedder.none_action.weight", "y_embedder.y_embedding"}
    for block in (f"{kind}_blocks.{i}" for kind in ("spatial", "temporal") for i in range(28)):
        expected |= {
            f"{block}.scale_shift_table",
            f"{block}.attn.q_norm.weight",
            f"{block}.attn.k_norm.weight",
        }
        expected |= linear(f"{block}.attn.qkv", f"{block}.attn.proj", f"{block}.mlp.fc1", f"{block}.mlp.fc2")
        expected |= linear(*(f"{block}.cross_attn.{part}" for part in ("q_linear", "kv_linear", "proj")))
    assert set(count) == expected
    assert live["x_embedder.proj.weight"] == (1152, 4, 1, 2, 2)
    assert live["temporal_blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert live["final_layer.linear.weight"] == (32, 1152) and live["rope.freqs"] == (36,)


def test_layouts_are_those_of_a_released_file(golden):
    published = {
        name.removeprefix("state."): tuple(value.shape)
        for name, value in golden("stdit3_tiny")[0].items()
        if name.startswith("state.")
    }
    with torch.device("meta"):
        network = STDiT(**CONFIGS["tiny"])
    live, dead = published_layout(network), dead_layout(network)
    assert set(live) | set(dead) == set(published)
    assert all(published[name] == shape for name, shape in live.items())
    of_text = ("y_embedder.y_embedding", "y_embedder.y_proj.fc1.weight")  # the text encoder's size is its own
    assert all(published[name] == shape for name, shape in dead.items() if name not in of_text)


# -- refusals ----------------------------------------------------------------------------------------------
def edit_network(release, edit):
    for shard in release.files.network.glob("*.safetensors"):
        state = load_file(shard)
        edit(state)
        save_file(state, shard)


def forget_in_index(release, without):
    index = release.files.network / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if k not in without}
    index.write_text(json.dumps(content))


def spoil_keys(release):
    def edit(state):
        state.pop("temporal_blocks.1.mlp.fc2.bias", None)
        if "t_block.1.bias" in state:
            state["t_block.1.bias"] = torch.zeros(7)
            state["module_of_mine.weight"] = torch.zeros(2)

    edit_network(release, edit)
    forget_in_index(release, ["temporal_blocks.1.mlp.fc2.bias"])


def drop_actions(release):
    gone = []

    def edit(state):
        gone.extend(name for name in state if name.startswith("action_embedder."))
        for name in gone:
            state.pop(name, None)

    edit_network(release, edit)
    forget_in_index(release, gone)


def other_robot(release):
    def edit(state):
        if "action_embedder.fc.0.weight" in state:
            state["action_embedder.fc.0.weight"] = torch.zeros(192, 14)

    edit_network(release, edit)


def lose_biases(release):
    state = torch.load(release.files.reward, weights_only=True)
    torch.save({k: v for k, v in state.items() if not k.endswith(("q_bias", "v_bias"))}, release.files.reward)


def edit_vae_config(**changes):
    def spoil(release):
        file = release.files.autoencoder / "config.json"
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return spoil


def edit_statistics(**changes):
    def spoil(release):
        file = release.files.statistics
        content = json.loads(file.read_text())
        action = {**content["coffee_d0_300_demos"]["action"], **changes}
        action = {k: v for k, v in action.items() if v is not None}
        file.write_text(json.dumps({"coffee_d0_300_demos": {"action": action}}))

    return spoil


def rename_statistics(release):
    release.files.statistics.write_text(release.files.statistics.read_text().replace("coffee", "stack_three"))


def spoil_picture(release):
    (release.files.start_frames / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")


def small_picture(release):
    from PIL import Image

    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(release.files.start_frames / "2.png")


REFUSALS = {
    "keys": (
        spoil_keys,
        r"1 missing: temporal_blocks.1.mlp.fc2.bias; 1 unknown: module_of_mine.weight; "
        r"1 of another shape: t_block.1.bias \(7,\) instead of \(288,\)",
    ),
    "no actions": (drop_actions, "knows no actions"),
    "other robot": (other_robot, "actions of 14 dimensions, task 'coffee' has 7"),
    "lost biases": (lose_biases, r"4 missing: .*layer.0.*query.bias, .*value.bias.*layer.1"),
    "no scaling factor": (edit_vae_config(scaling_factor=None), "scaling_factor None.*0.13025"),
    "other scaling factor": (edit_vae_config(scaling_factor=0.18215), "scaling_factor 0.18215"),
    "no numbers": (edit_vae_config(block_out_channels="wide"), "describes no autoencoder"),
    "other class": (edit_vae_config(_class_name="AutoencoderDC"), "not the directory of a diffusers Auto"),
    "other autoencoder": (edit_vae_config(layers_per_block=2), "missing: decoder.up_blocks.0.resnets.2"),
    "no mask": (edit_statistics(mask=None), 'has no mask.*nobody can tell.*add "mask"'),
    "no q99": (edit_statistics(q99=None), "q99 is None, expected a list"),
    "mask of numbers": (edit_statistics(mask=[1.0] * 7), r"mask is \[1\.0, .*expected a list"),
    "no list": (edit_statistics(q01=0.5), "q01 is 0.5, expected a list"),
    "six dimensions": (edit_statistics(q01=[-1.0] * 6), "q01 has 6 entries, task 'coffee' has actions of 7"),
    "no range": (edit_statistics(q01=[0.55] * 6 + [-1.0]), "dimension 0 ranges from 0.55 to 0.55"),
    "gripper from 0": (
        edit_statistics(q01=[-1.0] * 6 + [0.0]),
        "dimension 6 is masked out but ranges from 0.0",
    ),
    "statistics of another task": (
        rename_statistics,
        "statistics of 'stack_three_d0_300_demos'; task 'coffee' needs.*'coffee_d0_300_demos'",
    ),
    "damaged picture": (spoil_picture, r"2\.png is not a readable picture"),
    "other picture size": (small_picture, r"2\.png has 64x32 pixels, expected 64x64"),
    "picture without number": (
        lambda r: (r.files.start_frames / "2.png").rename(r.files.start_frames / "two.png"),
        r"two\.png: a first frame is named by its start state",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_anything_is_written(name, convert, release, tmp_path):
    spoil, message = REFUSALS[name]
    spoil(release)
    with pytest.raises(ArtifactError, match=message):
        convert()
    assert not (tmp_path / "world").exists() and not (tmp_path / ".world.tmp").exists()


def test_files_of_another_task_are_refused_by_their_path(release, tmp_path):
    square = replace(RELEASED_TASKS["square"], image_size=Sourced(64, "the reference vectors"))
    with pytest.raises(ArtifactError, match="P_128 belongs to task 'coffee' by its name, 'square' was asked"):
        convert_world(release.files, tmp_path / "world", square, **release.sizes)
    files = replace(release.files, reward=release.files.reward.with_name("videomae_stack_three.pth"))
    with pytest.raises(ArtifactError, match="'stack-three'"):
        convert_world(files, tmp_path / "world", release.task, **release.sizes)


def test_settings_out_of_range(convert, tmp_path):
    with pytest.raises(ValueError, match=r"context_noise is a noise level in \[0, 1\), got 50"):
        convert(context_noise=50)
    with pytest.raises(ValueError, match="Unknown normalisation 'clip'; choose one of imagenet, half"):
        convert(classifier_normalisation="clip")
    assert not (tmp_path / "world").exists()


def test_too_little_room_is_seen_before_writing(convert, monkeypatch, tmp_path):
    monkeypatch.setattr("wmpo_gym.convert.checkpoints.available_memory", lambda: 1000)
    with pytest.raises(ArtifactError, match="takes 0.0 GB of memory and 0.0 GB are available"):
        convert()
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(ArtifactError, match="are free there. Free some space"):
        convert()
    assert not (tmp_path / "world").exists()
