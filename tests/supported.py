"""What works with what, each cell by the test that proves it: the table of docs/supported.md.

``python tests/supported.py`` writes it anew.
"""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "supported.md"
SCHEDULES = ("midpoint", "gauss", "lookahead", "window")
REFUSED = "refused"


def each(test: str, *schedules: str) -> dict[str, str]:
    """The same test for several schedules, named where ``{}`` stands."""
    return {s: test.format(s) for s in schedules}


def mostly(test: str) -> dict[str, str]:
    return each(test, "midpoint", "lookahead")


LOOPS, STEP, WINDOW, EDGES = (f"tests/run/test_{name}.py::test_" for name in ("loops", "inrun", "window", "window_edges"))
EVERY, SEVERAL = "tests/run/test_every_optimizer.py::test_", "tests/run/test_several.py::test_"
DDP, FSDP = (f"tests/processes/test_{name}.py::test_scores_are_those_of_one_process" for name in ("replicas", "shards"))
FRAMEWORKS, TRAINERS = "tests/integrations/test_frameworks.py::test_", "tests/processes/test_trainers.py::test_"
TRL = "tests/integrations/test_trl.py::test_"

# by schedule: the start of the ids of tests that fail where the cell is wrong
TABLE: dict[str, dict[str, dict[str, str]]] = {
    "Loops": {
        "accumulation, micro-batches of any sizes": mostly(STEP + "accumulation_over_micro_batches_of_different_sizes[{}]")
        | {
            "gauss": LOOPS + "accumulation_after_a_skipped_step[gauss]",
            "window": WINDOW + "accumulation_over_uneven_micro_batches",
        },
        "clipping by norm": mostly(STEP + "gradient_scaled_between_backward_and_step[clip-{}]")
        | {"gauss": SEVERAL + "is_as_one_with_groups[gauss-clipped", "window": WINDOW + "clipping_by_norm"},
        "clipping by value": {s: f"{REFUSED} {STEP}elementwise_edits_are_refused[{s}-" for s in ("midpoint", "lookahead")}
        | {"window": f"{REFUSED} {WINDOW}gradients_that_are_clipped_by_value"},
        "parameter groups, learning rate schedules, frozen parameters": mostly(
            STEP + "groups_scheduler_frozen_and_absent_gradients[none-{}]"
        )
        | {"window": WINDOW + "a_schedule_of_learning_rates"},
        "steps that are skipped": each(LOOPS + "skipped_steps[overflow-batch, zero_grad-none-{}]", *SCHEDULES[:3])
        | {"window": WINDOW + "a_step_that_turns_out_to_have_been_skipped"},
        "several optimizers": each(SEVERAL + "is_as_one_with_groups[{}--", *SCHEDULES),
        "several validation losses": {"midpoint": STEP + "targets", "window": WINDOW + "several_targets"},
        "packed rows": mostly(STEP + "samples_packed_in_rows[{}]"),
        "resuming": mostly(STEP + "resumed_run_ends_with_the_same_totals[{}]")
        | {"window": WINDOW + "resumed_in_the_middle_of_a_window"},
    },
    "Precision and memory": {
        "bfloat16 autocast": mostly(STEP + "autocast_bf16[{}]")
        | each(EDGES + "a_step_inside_of_autocast_is_scored_like_one_outside[{}]", "gauss", "window"),
        "float16 with a `GradScaler`": mostly(STEP + "grad_scaler_and_its_skipped_step[unscale-{}]")
        | {"window": WINDOW + "a_gradient_scaler_that_skips_steps"},
        "activation checkpointing": mostly(STEP + "activation_checkpointing[0.3-nonreentrant-{}]"),
        "dropout": mostly(STEP + "dropout[{}]") | {"window": WINDOW + "dropout"},
        "`torch.compile`": {
            "midpoint": f"{REFUSED} {STEP}compiled_model_in_lookahead",
            "lookahead": STEP + "compiled_model_in_lookahead",
            "window": WINDOW + "compiled_model",
        },
    },
    "Optimizers": {
        name: each(f"{EVERY}running_layer[{name}-{{}}]", *SCHEDULES[:3]) | {"window": f"{EVERY}window[{name}]"}
        for name in ("SGD", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adafactor")
    }
    | {
        "Adam, AdamW": each(STEP + "plain[{}]", *SCHEDULES[:3]) | {"window": WINDOW + "every_option_of_the_optimizer"},
        "Muon and AdamW": each("tests/run/test_muon_and_adam.py::test_scores_are_those_of_the_very_step[{}]", *SCHEDULES[:3])
        | {"window": "tests/run/test_muon_and_adam.py::test_window_is_the_derivative_of_the_training"},
        "Lion": {
            "midpoint": "tests/optim/test_elsewhere.py::test_secant[Lion]",
            "lookahead": f"{REFUSED} tests/optim/test_elsewhere.py::test_what_a_sign_does_not_allow_is_refused[lookahead",
            "window": f"{REFUSED} tests/optim/test_elsewhere.py::test_what_a_sign_does_not_allow_is_refused[window",
        },
    },
    "Processes": {
        "`DistributedDataParallel`": each(DDP + "[{}]", "midpoint", "lookahead", "window"),
        "`DistributedDataParallel`, ranks without samples": {
            "midpoint": DDP + "[none]",
            "lookahead": DDP + "[lookahead-none]",
            "window": DDP + "[window-none]",
        },
        "`fully_shard` (FSDP2)": each(FSDP + "[{}]", *SCHEDULES),
        "`fully_shard`, ranks without samples": {
            "midpoint": FSDP + "[none]",
            "lookahead": FSDP + "[lookahead-none]",
            "window": FSDP + "[window-none]",
        },
    },
    "Frameworks": {
        "Hugging Face `Trainer`": {"midpoint": FRAMEWORKS + "trainer[plain]", "window": FRAMEWORKS + "trainer_windows[plain]"},
        "Lightning": each(FRAMEWORKS + "lightning[plain-{}]", "midpoint", "window"),
        "Accelerate": {"midpoint": FRAMEWORKS + "accelerate"},
        "PEFT (LoRA)": {"midpoint": FRAMEWORKS + "lora"},
        "TRL: SFT, packed and padding-free": mostly(TRL + "sft[bfd-{}]"),
        "TRL: DPO": mostly(TRL + "dpo[{}]"),
        "torchtitan's loop": mostly(TRAINERS + "torchtitan_loop[{}]"),
    },
}


def proofs() -> Iterable[str]:
    """The beginnings of ids that the table names."""
    for rows in TABLE.values():
        for cells in rows.values():
            yield from (cell.removeprefix(f"{REFUSED} ") for cell in cells.values())


def table() -> str:
    lines = []
    for part, rows in TABLE.items():
        lines += [
            f"### {part}\n",
            f"| | {' | '.join(f'`{s}`' for s in SCHEDULES)} | proved in |",
            "|---" * (len(SCHEDULES) + 2) + "|",
        ]
        for name, cells in rows.items():
            said = [("refused" if cells[s].startswith(REFUSED) else "yes") if s in cells else "" for s in SCHEDULES]
            files = dict.fromkeys(f"`{cell.removeprefix(f'{REFUSED} ').split('::')[0]}`" for cell in cells.values())
            lines.append(f"| {name} | {' | '.join(said)} | {', '.join(files)} |")
        lines.append("")
    return "\n".join(lines)


def written(text: str) -> str:
    return re.sub(r"(<!-- table -->\n).*?(<!-- end of table -->)", lambda m: f"{m[1]}{table()}\n{m[2]}", text, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
