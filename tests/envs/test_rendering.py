"""What a picture shows, by numbers and beside stored pictures.

`python tests/envs/test_rendering.py` rewrites the stored pictures; look before they are kept.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled, ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from hydrogel_gym import HydrogelEnv, HydrogelVectorEnv, RewardConfig, load_polymers
from hydrogel_gym.envs.rendering import (
    HEART_CENTRE_PX,
    HEART_RADIUS_PX,
    HEIGHT_PX,
    WIDTH_PX,
    Evaluation,
    Scene,
    cavity_radius_mm,
    describe,
    draw,
    pixels_per_mm,
    short_axis,
)
from hydrogel_gym.problem.fields import (
    COVERAGE_FRACTIONS,
    FORMULATION_FIELDS,
    OUTCOME_FIELDS,
    PATIENT_FIELDS,
    Field,
)

REFERENCES = Path(__file__).parent / "references"
TYPICAL = dict(
    zip(
        [field.name for field in PATIENT_FIELDS],
        (36.4, -11.0, 208.0, 132.3, 21.0, 13.0, 34.2, 18.0, 1.9, 0.54, 6.5),
        strict=True,
    )
)
SMALL = {"edv_ml": 90.0, "wall_thickness_mm": 4.0, "transmurality": 0.2}
SMALL |= {"scar_fraction_pct": 5.0, "bz_fraction_pct": 4.0}
LARGE = {"edv_ml": 400.0, "wall_thickness_mm": 13.0, "transmurality": 1.0}
LARGE |= {"scar_fraction_pct": 45.0, "bz_fraction_pct": 28.0}
THIN_PATCH, THICK_PATCH = (5.0, 7.0, 0.0, 1.0), (30.0, 180.0, 1.0, 5.0)
GOOD = (4.2, 18.2, 1.6, 0.08, 0.91, 0.12)
BAD = (-0.4, -12.2, -3.0, 0.183, 0.71, 0.223)
WORST = (-100.0, -100.0, -500.0, 1.0, 0.0, 1.0)


def scene(patient=None, design=None, **changes) -> Scene:
    """A typical patient with changes, and a design if its changes are given."""
    patient, evaluation = TYPICAL | (patient or {}), None
    if design is not None:
        made = {"polymer": "MeHA_photocrosslink", "formulation": (12.3, 45.0, 0.2, 2.5)}
        predicted = {"coverage": 2, "outcomes": GOOD, "reward": 13.52, "iteration": 1}
        evaluation = Evaluation(**(made | predicted | design))
    return Scene("P0042", tuple(patient.values()), evaluation=evaluation, **changes)


THIN = {"coverage": 0, "formulation": THIN_PATCH, "outcomes": BAD, "reward": -3.2}
THICK = {"formulation": THICK_PATCH, "outcomes": WORST, "reward": -303.2, "iteration": 100}
SCENES = {
    "patient": scene(),
    "typical": scene(design={}),
    "thin_scar_only": scene(SMALL, THIN),
    "thick_full_coverage": scene(LARGE, THICK | {"coverage": 3}, horizon=100),
}


def within(fields: tuple[Field, ...], name: str) -> st.SearchStrategy[float]:
    field = next(field for field in fields if field.name == name)
    return st.floats(field.low, field.high)


PATIENTS = st.fixed_dictionaries({name: within(PATIENT_FIELDS, name) for name in LARGE})
THICKNESSES = within(FORMULATION_FIELDS, "thickness_mm")


@given(PATIENTS, THICKNESSES, st.sampled_from(COVERAGE_FRACTIONS))
def test_patch_covers_the_scar_and_its_share_of_the_border_zone_within_the_picture(
    patient, thickness_mm, share
):
    axis = short_axis(patient, thickness_mm, share)
    covered_pct = patient["scar_fraction_pct"] + share * patient["bz_fraction_pct"]
    assert 100.0 * axis.patch_rad / math.pi == pytest.approx(covered_pct)
    assert axis.patch_mm - axis.epicardium_mm == pytest.approx(thickness_mm)
    assert axis.epicardium_mm - axis.cavity_mm == pytest.approx(patient["wall_thickness_mm"])
    assert axis.scar_rad <= axis.patch_rad <= axis.border_rad <= 0.73 * math.pi + 1e-9
    assert 0.0 < axis.cavity_mm < axis.scar_mm <= axis.epicardium_mm <= axis.patch_mm
    radius_px = axis.patch_mm * pixels_per_mm(axis)
    assert radius_px <= HEART_RADIUS_PX + 1e-9
    for centre, size in zip(HEART_CENTRE_PX, (WIDTH_PX, HEIGHT_PX), strict=True):
        assert 0.0 < centre - radius_px
        assert centre + radius_px < size
    bare = short_axis(patient)
    assert bare == axis._replace(patch_mm=axis.epicardium_mm, patch_rad=0.0)


def test_cavity_has_the_end_diastolic_volume_of_a_sphere():
    assert cavity_radius_mm(36.0 * math.pi) == pytest.approx(30.0)


@given(st.floats(1.0, 5000.0), st.floats(0.0, 300.0), st.floats(0.0, 300.0))
def test_ventricle_that_no_cohort_may_have_stays_within_circle_and_picture(edv_ml, scar, border):
    patient = TYPICAL | {"edv_ml": edv_ml, "scar_fraction_pct": scar, "bz_fraction_pct": border}
    axis = short_axis(patient, 5.0, 1.0)
    assert 0.0 <= axis.scar_rad <= axis.patch_rad <= axis.border_rad <= math.pi
    assert axis.patch_mm * pixels_per_mm(axis) <= HEART_RADIUS_PX + 1e-9
    if edv_ml < 400.0:  # one scale for the patients of the cohort
        assert pixels_per_mm(axis) == pixels_per_mm(short_axis(TYPICAL))


@pytest.mark.parametrize("name", SCENES)
def test_picture_is_the_stored_one(name):
    with Image.open(REFERENCES / f"{name}.png") as image:
        stored = np.array(image.convert("RGB"), float)
    picture = draw(SCENES[name])
    assert picture.dtype == np.uint8
    assert picture.shape == stored.shape == (HEIGHT_PX, WIDTH_PX, 3)
    difference = np.abs(picture - stored)
    assert difference.mean() < 0.5
    tiles = difference.reshape(HEIGHT_PX // 32, 32, WIDTH_PX // 32, 32, 3).mean((1, 3, 4))
    assert tiles.max() < 5.0
    # No font is in the heart, so that nothing there but an edge may differ from one Pillow to
    # another; an edge that is two pixels off would be some hundred of them.
    y, x = np.mgrid[:HEIGHT_PX, :WIDTH_PX] + 0.5
    is_heart = np.hypot(x - HEART_CENTRE_PX[0], y - HEART_CENTRE_PX[1]) < HEART_RADIUS_PX
    assert (difference[is_heart].max(-1) > 50.0).sum() < 50


def texts_of(monkeypatch, *scenes: Scene) -> list[list[tuple[str, tuple]]]:
    """Texts of each picture, with the box that each is written in."""
    written = []

    def record(canvas, xy, text, fill=None, font=None, anchor=None):
        written[-1].append((text, canvas.textbbox(xy, text, font=font, anchor=anchor)))

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    for each in scenes:
        written.append([])
        draw(each)
    return written


def test_texts_are_whole_and_never_overlap_nor_leave_the_picture(monkeypatch):
    scenes = [
        scene(LARGE, THICK | {"polymer": name, "coverage": 3}, horizon=100)
        for name in load_polymers().names[::4]
    ]
    scenes += [*SCENES.values(), Scene("x" * 500, tuple(TYPICAL.values()))]
    for texts in texts_of(monkeypatch, *scenes):
        boxes = [(*box, text) for text, box in texts if text]
        for i, (left, top, right, bottom, text) in enumerate(boxes):
            assert not text.endswith("...") or text.startswith("Virtual patient xxx")
            assert 0 <= left <= right <= WIDTH_PX, text
            assert 0 <= top <= bottom <= HEIGHT_PX, text
            for other in boxes[:i]:
                apart = right <= other[0] or other[2] <= left
                assert apart or bottom <= other[1] or other[3] <= top, (text, other[-1])


@pytest.mark.parametrize("margin", [0.0, 0.1], ids=["default limits", "stricter limits"])
def test_picture_and_text_tell_the_design_and_the_limits_that_it_breaks(monkeypatch, margin):
    outcomes = (4.2, 18.2, 1.6, 0.1, 0.85, 0.15)
    expected = scene(design={"outcomes": outcomes}, limits=RewardConfig().stricter(margin))
    texts = [text for text, _ in texts_of(monkeypatch, expected)[0]]
    broken = ["0.100 > 0.050", "0.850 < 0.900", "0.150 > 0.100"]
    assert [text for text in texts if ">" in text or "<" in text] == (broken if margin else [])
    told = describe(expected)
    assert told.count("(limit broken)") == (3 if margin else 0)
    for fact in ("P0042: LVEF 36.4 %", "Scar 21.0 %", "2.5 mm thick", "27.5 %", "Reward 13.52"):
        assert fact in told


ACTION = (4, np.array([12.0, 60.0, 0.5, 3.0], np.float32), 3)
BATCH = (np.full(3, 4), np.tile(ACTION[1], (3, 1)), np.full(3, 3))
made = functools.partial(HydrogelEnv, action_format="tuple")
same = np.array_equal


def test_picture_has_patient_clipped_design_outcomes_and_reward_until_the_reset():
    env = made(render_mode="rgb_array", horizon=2)
    _, info = env.reset(seed=1)
    patient_index = info["patient_index"]
    patient_id = env.problem.cohort.patient_ids[patient_index]
    patient = tuple(env.problem.cohort.features[patient_index].tolist())
    bare = Scene(patient_id, patient, horizon=2)
    assert same(env.render(), draw(bare))
    rewards = []
    for iteration in (1, 2):
        _, reward, terminated, _, info = env.step((4, np.array([99.0, 60.0, 0.5, 3.0]), 3))
        rewards.append(reward)
        outcomes = tuple(float(info[field.name]) for field in OUTCOME_FIELDS)
        formulation = (30.0, 60.0, 0.5, 3.0)
        evaluation = Evaluation("GelMA_BioIL", formulation, 3, outcomes, reward, iteration)
        assert same(env.render(), draw(dataclasses.replace(bare, evaluation=evaluation)))
    assert terminated
    assert rewards[0] > rewards[1]  # which lacks the bonus of a new polymer
    env.reset(options={"patient_id": patient_index})
    assert same(env.render(), draw(bare))


@pytest.mark.parametrize("env_class", [HydrogelEnv, HydrogelVectorEnv])
def test_render_needs_a_mode_a_patient_and_a_library_that_it_names(env_class, monkeypatch):
    with pytest.warns(UserWarning, match="draws nothing without a render_mode"):
        assert env_class().render() is None
    env = env_class(render_mode="rgb_array")
    with pytest.raises(ResetNeeded, match="before render"):
        env.render()
    monkeypatch.setitem(sys.modules, "PIL", None)
    env.reset(seed=0)
    with pytest.raises(DependencyNotInstalled, match=r'Pillow: pip install -e "\.\[render\]"'):
        env.render()


@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
def test_rendering_is_sound_touches_no_generator_and_changes_no_step(mode):
    def trace(mode) -> list[str]:
        env = made(render_mode=mode, horizon=2)
        trace = [env.reset(seed=5)]
        for step in (env.step, env.step, lambda _: env.reset(), env.step):
            trace.append(step(ACTION))
            if mode:
                env.render()
        legacy = np.random.get_state()  # noqa: NPY002
        return [str(x) for x in (*trace, random.getstate(), legacy, torch.get_rng_state().tolist())]

    assert trace(None) == trace(mode)
    env = gym.make("HydrogelDesignFlat-v0", render_mode=mode)
    check_env(env.unwrapped, skip_render_check=False)  # a warning is an error here


def vector(mode: str = "SameStep", **kwargs) -> HydrogelVectorEnv:
    kwargs = {"render_mode": "ansi", "action_format": "tuple", "autoreset_mode": mode} | kwargs
    return HydrogelVectorEnv(3, **kwargs)


def designs(frames: tuple[str, ...]) -> list[str]:
    """The line of each text that tells the design."""
    return [frame.splitlines()[2].partition(":")[0] for frame in frames]


@pytest.mark.parametrize(("mode", "output"), [("rgb_array", "torch"), ("ansi", "numpy")])
def test_frames_of_a_vector_are_those_of_single_environments(mode, output):
    envs = vector(render_mode=mode, horizon=2, output=output)
    envs.reset(seed=0)
    frames = [envs.render()]
    action = copy.deepcopy(BATCH)
    envs.step(tuple(map(torch.from_numpy, action)) if output == "torch" else action)
    action[1][:] = 0.0  # the caller's own array
    frames.append(envs.render())
    for row in range(3):
        env = made(render_mode=mode, horizon=2)
        env.reset(options={"patient_id": row})
        assert same(frames[0][row], env.render())
        env.step(ACTION)
        assert same(frames[1][row], env.render())


def test_vector_that_resets_in_the_same_step_shows_the_design_and_the_patient_it_was_for():
    envs = vector(patient_assignment="random", validate_actions=False)
    envs.reset(seed=4)
    patients = [frame.splitlines()[0] for frame in envs.render()]
    polymers, *others = BATCH
    envs.step((polymers * [1, 99, 1], *others))
    frames = envs.render()
    assert designs(frames) == ["Design 1 of 1", "No design yet", "Design 1 of 1"]
    assert [frame.splitlines()[0] for frame in frames[::2]] == patients[::2]
    envs.reset()
    assert designs(envs.render()) == ["No design yet"] * 3
    assert [frame.splitlines()[0] for frame in envs.render()] != patients


def test_vector_shows_no_design_in_a_row_that_was_reset():
    envs = vector("Disabled", horizon=2)
    envs.reset(seed=0)
    envs.step(BATCH)
    envs.reset(options={"reset_mask": np.array([False, True, False])})
    assert designs(envs.render()) == ["Design 1 of 2", "No design yet", "Design 1 of 2"]
    envs.step(BATCH)
    assert designs(envs.render()) == ["Design 2 of 2", "Design 1 of 2", "Design 2 of 2"]
    envs.load_state_dict(envs.state_dict())
    assert designs(envs.render()) == ["No design yet"] * 3
    envs = vector("NextStep")
    envs.reset(seed=0)
    for seen in ("Design 1 of 1", "No design yet", "Design 1 of 1"):
        envs.step(BATCH)
        assert designs(envs.render()) == [seen] * 3


if __name__ == "__main__":
    for _name, _scene in SCENES.items():
        # A palette loses less than a tenth of a grey level and two thirds of the size.
        _image = Image.fromarray(draw(_scene)).quantize(256, dither=Image.Dither.NONE)
        _image.save(REFERENCES / f"{_name}.png", optimize=True)
