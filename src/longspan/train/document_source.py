"""Training of language models and masked models: batches of lanes or pieces of documents, in stages."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import state as states
from longspan.errors import ConfigError
from longspan.mixers import with_aux_losses
from longspan.models import Decoder
from longspan.tasks import Documents
from longspan.train import checkpoint as checkpoints
from longspan.train.checkpoint import Checkpoint, Position
from longspan.train.config import TrainConfig
from longspan.train.distributed import Group
from longspan.train.lanes import Batch, Lanes
from longspan.train.loss import adaptive_head, chunked_next_token_loss, next_token_loss
from longspan.train.pieces import Pieces
from longspan.train.source import BatchSource, PartLoss, StepBatch, StepResult

# between the seeds of two stages, so that each stage reads the text in another order
_SEED_STEP = 1_000_003


class DocumentPart(NamedTuple):
    """The lanes that are read in one forward and backward pass."""

    state_index: int
    """of the part's carried state, in `carried`"""
    segments: list[Batch]
    """`bptt_segments` consecutive segments of all lanes of this process"""
    lanes: slice
    """those of this part"""
    tokens: float
    """number of predictions in the step, over all parts and processes"""


class DocumentSource(BatchSource):
    """Reads documents in lanes or pieces, and carries the states of lanes from step to step.

    Args:
        model: on the device of the group, in its dtype.
        documents: to train on.
        config: `[train]` table.
        group: processes of the run.
        unit: name of the units that the task counts.

    Raises:
        ConfigError: processes x `accumulation` does not divide `lanes`, of `[train]` or of a stage.
        UnsupportedError: `loss_chunk` with a model whose output layer is not a linear map.
    """

    config: TrainConfig
    data: Lanes | Pieces
    """position in the data of the current stage"""

    def __init__(
        self, model: Any, documents: Documents, config: TrainConfig, group: Group, *, unit: str = "byte"
    ) -> None:
        super().__init__(model, config, group)
        for index, stage in enumerate(config.stage_configs):
            if stage.lanes % (config.accumulation * group.world_size):
                where = "train" if config.stages is None else f"train.stages[{index}]"
                raise ConfigError(
                    f"{where}.lanes = {stage.lanes}: must be a multiple of {group.world_size} processes x "
                    f"train.accumulation = {config.accumulation}"
                )
        if config.loss_chunk:
            model.head()
        self.by_head = bool(config.loss_chunk) or adaptive_head(model) is not None
        self.unit, self._documents, self.stages = unit, documents, config.stage_configs
        self._state: Any = None
        self._redraws = model.redraw_count
        self._begin_stage(0)

    def _begin_stage(self, index: int) -> None:
        """Read from the start of a stage's own order of the text, with no carried state."""
        self.stage, fields = index, self.stages[index]
        self.carry = fields.carries and self.model.traits.streams
        self.carried = [None] * fields.accumulation
        kind: type[Lanes | Pieces] = Pieces if fields.sampling == "pieces" else Lanes
        self.data = kind(
            self._documents,
            lanes=fields.lanes,
            segment_length=fields.segment_length,
            seed=fields.seed + index * _SEED_STEP,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )

    def title(self) -> str:
        """Describe the training data, for the first line of the display."""
        return ", then ".join(
            f"{stage.lanes} {stage.sampling} x {stage.segment_length} tokens" for stage in self.stages
        )

    def draw(self, step: int) -> StepBatch:
        """Return the next `bptt_segments` segments of this process's lanes, in the stage of step `step`."""
        stage = self.config.stage_at(step)
        if stage != self.stage:
            self._begin_stage(stage)
        segments = [next(self.data) for _ in range(self.stages[stage].bptt_segments)]
        own_tokens = sum(int(batch.graded.sum()) for batch in segments)
        own_units = sum(int(batch.sizes.sum()) for batch in segments)
        tokens, units = self.group.sum(own_tokens, own_units)
        self._redraws = self.model.redraw_count
        rows = segments[0].tokens.shape[0] // self.config.accumulation
        parts = [
            DocumentPart(index, segments, lanes=slice(index * rows, (index + 1) * rows), tokens=tokens)
            for index in range(self.config.accumulation)
        ]
        return StepBatch(parts, tokens=int(tokens), units=int(units))

    def loss(self, part: DocumentPart) -> PartLoss:
        """Read the segments of some lanes, from their carried states; the sum `loss` is in nats."""
        losses, aux_losses = list[Tensor](), list[Tensor]()
        state = self.carried[part.state_index]
        for segment in part.segments:
            batch = segment.at(part.lanes).to(self.group.device)
            layout: dict[str, Any] = {"mask": batch.mask, "reset": batch.reset, "aux_losses": aux_losses}
            if isinstance(self.model, Decoder):
                layout["keep_state"] = self.carry
            with self.autocast():
                if self.by_head:
                    hidden, state = self.model.hidden(batch.tokens, state, **layout)
                    head, chunk = self.model.head(), self.config.loss_chunk
                    loss = chunked_next_token_loss(hidden, head, batch.targets, batch.graded, chunk=chunk)
                else:
                    logits, state = self.model(batch.tokens, state, **layout)
                    loss = next_token_loss(logits, batch.targets, batch.graded)
            losses.append(loss)
            state = state if self.carry else None
        self._state = state
        nats = torch.stack(losses).sum()
        # an auxiliary loss is a mean over the tokens of a call, so a step takes the mean over its calls
        calls = len(part.segments) * self.config.accumulation * self.group.world_size
        total = with_aux_losses(nats / max(part.tokens, 1.0), aux_losses, calls)
        return PartLoss(total, {"loss": nats.detach()})

    def after_part(self, part: DocumentPart) -> None:
        """Carry the states of some lanes to the next step."""
        # contiguous, like a state that was loaded: the last bit of a matrix product may depend on strides
        self.carried[part.state_index] = None if self._state is None else states.clone(states.detach(self._state))
        self._state = None

    def after_step(self, result: StepResult) -> None:
        """Drop the carried states if random projections were redrawn, because states belong to one draw."""
        if self.model.redraw_count != self._redraws:
            self.carried = [None] * self.config.accumulation

    def log_sums(self, result: StepResult) -> dict[str, float]:
        """Return the nats and units of a step."""
        return {"nats": result.sums["loss"], "units": result.units}

    def figures(self, position: Position) -> dict[str, Any]:
        """Return loss, bits per unit and epoch for a log line."""
        pending = position.pending
        return {
            "loss": pending["nats"] / max(pending["tokens"], 1),
            f"bits_per_{self.unit}": pending["nats"] / max(pending["units"], 1) / math.log(2),
            "epoch": round(position.tokens / max(self.data.places_per_epoch, 1), 4),
        }

    def stage_fields(self) -> dict[str, int]:
        """Return the field `stage` (index from 1) of the lines of a log; none without stages."""
        return {} if self.config.stages is None else {"stage": self.stage + 1}

    def line_is_due(self, step: int) -> bool:
        """Return whether step `step` (from 0) begins another stage, so that no line has steps of two stages."""
        return self.config.stage_at(step) != self.stage

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data as plain data for a checkpoint."""
        return self.data.state_dict()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; raises CheckpointError if its data, lanes or groups of lanes differ."""
        self._begin_stage(checkpoint.position.stage)
        self.data.load_state_dict(checkpoint.position.lanes)
        self.carried = checkpoints.carried_states(checkpoint, self.model, self.config.accumulation, self.group)
