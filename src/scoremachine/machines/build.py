"""`build` and `calibrate`, which take a machine by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scoremachine.calibration import heldout
from scoremachine.calibration.heldout import BANDWIDTHS, Calibration, Teacher
from scoremachine.core.schedules import LOCALITIES, BandwidthSchedule, WeightSchedule
from scoremachine.core.windows import Augment
from scoremachine.data.corpus import Corpus
from scoremachine.machines.machine import MACHINES, Machine, setting_names
from scoremachine.machines.windowed import WINDOWS
from scoremachine.runtime.parsing import any_number
from scoremachine.runtime.validation import check_name, unknown

ALIASES = {"cfdm": "smoothed"}


def kind_of(name: str) -> type[Machine]:
    """The class of the machine called `name`; ValueError if there is none."""
    name = ALIASES.get(name, name)
    check_name("machine", name, MACHINES)
    return MACHINES[name]


def spelled(text: str) -> tuple[str, dict[str, Any]]:
    """Parses NAME[:LOCALITY][+WINDOW][+circular][+h] into a name and settings of `build`.

    WINDOW is gaussian or wiener, for box-window machines; circular is the boundary of `els` and
    `epc`; h means a calibrated bandwidth.

    Raises:
        ValueError: For an unknown name, or a locality of a machine that has none.
    """
    rest, *additions = re.split(r"\+(?!.*\.json)", text.strip())  # a path may contain a plus
    name, colon, value = rest.partition(":")
    kind = kind_of(name)
    known = setting_names(kind)
    settings: dict[str, Any] = {}
    for addition in additions:
        if addition == "h":
            settings["bandwidth"] = "auto"
        elif addition in WINDOWS and "window" in known:
            settings["window"] = addition
        elif addition == "circular" and "boundary" in known:
            settings["boundary"] = addition
        else:
            raise ValueError(
                f"{text!r} has +{addition}; expected +h, +gaussian or +wiener with machines of "
                "boxes (ls, els, pspc, epc), or +circular with els and epc"
            )
    if colon:
        if kind.locality is None:
            raise ValueError(f"{kind.name} has no locality: use {kind.name!r} without a colon")
        if not value:
            raise ValueError(
                f"{text!r} says nothing after its colon; expected a number, auto, network, or a "
                "schedule"
            )
        settings[kind.locality] = any_number(value)
    return kind.name, settings


def build(name: str, corpus: Corpus, **settings: Any) -> Machine:
    """The machine called `name` on `corpus`.

    Arguments:
        name: "ideal", "gaussian", "es", "ls", "els", "pspc", "epc", "pspc-flex", "pca",
            "smoothed" (also called "cfdm") or "composite".
        corpus: The images, or a `Mixture` of them.
        settings: bandwidth, kernel, schedule, and the machine's other settings. Machines without
            patches accept `patch_size="auto"` too, and ignore it.

    Raises:
        ValueError: For an unknown name or a setting that the machine does not have.
    """
    kind = kind_of(name)
    known = setting_names(kind)
    if settings.get("patch_size") == "auto" and "patch_size" not in known:
        del settings["patch_size"]
    for setting in settings:
        if setting not in known:
            problem = f"machine {name!r} has no setting {setting!r}"
            if setting == "label":
                problem += " (give it to denoise, score, log_density or generate)"
            raise ValueError(unknown(problem, setting, known))
    return kind(corpus, **settings)


def calibrate(
    corpus: Corpus,
    machine: str = "ls",
    sigmas: Sequence[float] | np.ndarray | None = None,
    held_out: int = 16,
    seed: int = 0,
    network: Teacher | None = None,
    **settings: Any,
) -> Calibration:
    """Chooses locality (patch size, share, threshold or delta) and bandwidth per noise level.

    By held-out denoising: some images are left out of the source. The settings are chosen on half
    of them, the validation images, and their error is reported on the other half, the test images.
    A corpus of a few pictures is cut into crops first, and held-out crops are at least a crop's
    width away from those of the source. The result is kept in the cache.

    Arguments:
        corpus: The images; those not held out are the source.
        machine: The machine's name.
        sigmas: Noise levels; None: the 18 of EDM.
        held_out: The number of validation images, and of test images.
        seed: Of the choice of images and of their noise.
        network: A trained network (`scoremachine.Network`): errors are measured to its D, as in
            Kamb & Ganguli 2412.20292 and Niedoba et al. 2411.19339, not to the clean image.
        settings: `values` and `bandwidths` to try, and further settings of the machine, such as
            `boundary`. `values`: of the machine's locality; None: `machine.candidates()`, for boxes
            odd sizes from 3 to the image's side. (A box of one pixel often has the smallest error
            at low noise, but its pixels are denoised independently, so samples are speckled.)
            0 is always among the bandwidths.

    Raises:
        ValueError: If the corpus has too few images, or an argument is out of range.
    """
    values, bandwidths = settings.pop("values", None), settings.pop("bandwidths", BANDWIDTHS)
    prototype = build(machine, corpus, **settings)
    return heldout.calibrate(prototype, sigmas, held_out, values, bandwidths, seed, network=network)


def recorded(settings: Mapping[str, Any], corpus: Corpus, **changes: Any) -> Machine:
    """The machine that a record describes (`Machine.settings`), of a corpus.

    Arguments:
        settings: The record; entries that are no settings of the machine are not looked at.
        corpus: The images.
        changes: Other settings, such as `schedule`.

    Raises:
        ValueError: For a record of no machine, or of one whose settings are in files elsewhere.
    """
    if not isinstance(settings.get("machine"), str):
        raise ValueError("the record names no machine; expected the run.json of scoremachine")
    kind = kind_of(settings["machine"])
    found = {name: settings[name] for name in setting_names(kind) if name in settings}
    if found.get("heat_maps", "wiener") != "wiener":
        raise ValueError(
            f"the record names heat maps ({found['heat_maps']}) that it does not hold: build the "
            "machine and call sm.explain"
        )
    schedules = dict(LOCALITIES, bandwidth=BandwidthSchedule, weights=WeightSchedule)
    for name, value in found.items():
        if name in schedules and isinstance(value, dict):
            found[name] = schedules[name](value["sigmas"], value["values"], name=value["name"])
    if isinstance(found.get("augment"), dict):
        found["augment"] = Augment(**found["augment"])
    if isinstance(found.get("of"), dict):
        found["of"] = {label: recorded(each, corpus) for label, each in found["of"].items()}
    found.pop("kernel", None)
    return build(kind.name, corpus, **{**found, **changes})
