"""Two ranks (gloo, CPU) compute what one process computes: DDP, FSDP2, DTensor. Each scenario is in distributed_worker.py.

Seen to fail: the sum over ranks left out of a replicated bias's gradient (dtensor), K/V heads sharded beside whole query heads
(dtensor), a rule cached without the flags of the call (dtensor), dropout sharded over heads (dtensor_dropout_and_packed), context_parallel not looked for.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("distributed_worker.py")
SCENARIOS = ("ddp", "ddp_patched", "fsdp", "dtensor", "dtensor_fp8", "dtensor_dropout_and_packed", "tensor_parallel", "context_parallel", "ranks_that_disagree", "fsdp_checkpointed")
RANKS, TIMEOUT_S = 2, 150


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank says of each scenario. One start of the ranks serves all: most of their time is importing."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATTNHUB_")}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(RANKS), str(folder), *SCENARIOS],
            env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    found = []
    try:
        for rank, process in enumerate(processes):
            output = process.communicate(timeout=TIMEOUT_S)[0]
            said = folder / f"rank{rank}.json"
            found.append(json.loads(said.read_text()) if said.exists() else {"": output})
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_ranks_agree_with_one_process(scenario: str, outcomes: list[dict[str, str]]) -> None:
    for rank, said in enumerate(outcomes):
        assert scenario in said, f"rank {rank} did not come to it: {said}"
        assert said[scenario] == "", f"rank {rank}: {said[scenario]}"


def test_importing_attnhub_does_not_import_dtensor() -> None:
    program = (
        "import sys, torch, attnhub\n"
        "q = torch.zeros(1, 1, 2, 8)\n"
        "attnhub.attention(q, q, q)\n"
        "assert 'torch.distributed.tensor' not in sys.modules and 'attnhub.distributed' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
