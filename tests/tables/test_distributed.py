"""Several ranks: rows do not train there yet, and say so; reading them, and DDP's broadcasts, leave them alone."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from engram_lm import MemoryConfig, attach, memories
from engram_lm.errors import RowUpdateError
from models import build, tokenizer


def on_one_rank(rank: int, store: str, world: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        model = attach(
            build("llama"), tokenizer(), MemoryConfig(layers=(1,), rows_per_head=53, head_width=4, heads=2)
        )
        (slot,) = memories(model)["memory"].slots
        slot.table.rows_view().fill_(float(rank + 1))
        wrapped = DistributedDataParallel(model.train())
        ids = torch.arange(10)[None] + 5
        try:
            wrapped(input_ids=ids, labels=ids)
            said = "nothing"
        except RowUpdateError as error:
            said = str(error)
        slot.handle.requires_grad_(False)
        logits = model(ids).logits
        torch.save(
            {"said": said, "rows": slot.table.rows_view().clone(), "logits": logits.detach()}, f"{out}.{rank}"
        )
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_training_on_two_ranks_is_refused_by_name_and_rows_are_not_broadcast(tmp_path):
    out = tmp_path / "out"
    torch.multiprocessing.spawn(on_one_rank, (str(tmp_path / "store"), 2, str(out)), nprocs=2)
    for rank in range(2):
        found = torch.load(f"{out}.{rank}")
        assert "DDP, FSDP and other torch.distributed training are not supported yet" in found["said"]
        assert (found["rows"] == rank + 1).all()
        assert torch.isfinite(found["logits"]).all()
