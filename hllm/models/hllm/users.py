"""The User LLM: item vectors in, the next interest out, at every position."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hllm.models.common.backbone import word_vectors
from hllm.models.common.history import UNKNOWN_ITEM, History
from hllm.models.common.packing import on_device, run_packed
from hllm.models.hllm.features import EventFeatures
from hllm.models.hllm.fusion import EarlyFusion, LateFusion
from hllm.models.hllm.probes import ProbedPacking, Probes

# T events of all histories one after another, S histories, P candidates, D vector width, I width inside the
# User LLM, H heads


class DecoderUser(nn.Module):
    """The User LLM (HLLM, section 3.2): a decoder whose word embeddings are replaced by item vectors.

    Item vectors have unit length; a learned scale gives them the size that the layers expect. It starts at
    the mean length of a pretrained backbone's word embeddings; with random layers at the root of the width,
    so that a history's latest item outweighs what layers add that have learned nothing yet. Between towers of
    different widths a projection leads in, and its transpose, to start with, out: the user's vector is as
    wide as an item's.

    With `objective` early_fusion or late_fusion it also judges candidates (`hllm.models.hllm.fusion`).
    """

    def __init__(
        self,
        decoder: Any,
        item_width: int = 0,
        features: EventFeatures | None = None,
        objective: str = "generative",
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        words = word_vectors(decoder)
        inside = words.shape[1]
        scale = words.norm(dim=1).mean() if pretrained else torch.tensor(inside**0.5)
        self.input_scale = nn.Parameter(scale)
        self.width = item_width or inside
        if self.width != inside:
            self.into = nn.Linear(self.width, inside, bias=False)
            self.out = nn.Linear(inside, self.width, bias=False)
            nn.init.orthogonal_(self.into.weight)
            with torch.no_grad():
                self.out.weight.copy_(self.into.weight.T)
        self.inside = inside
        self.features = features
        self.objective = objective
        self.fusion: EarlyFusion | LateFusion | None = None
        if objective == EarlyFusion.name:
            self.fusion = EarlyFusion(inside)
        elif objective == LateFusion.name:
            self.fusion = LateFusion(inside, self.width, float(self.input_scale.detach()))
        decoder.set_input_embeddings(nn.Identity())
        self.decoder = decoder

    def forward(self, vectors_TD: Tensor, history: History) -> Tensor:
        """(T, D) unit item vectors -> (T, D) unit next-interest vectors, causal within each history."""
        inputs_TI = self._told(self._at_input(vectors_TD), history.items_T, history.times_T)
        return self._as_items(run_packed(self.decoder, inputs_TI, history.packing))

    def judge(
        self, vectors_TD: Tensor, history: History, candidates_PD: Tensor, probes: Probes
    ) -> tuple[Tensor, Tensor]:
        """Histories and candidates in one pass: the (T, D) next-interest vectors, as `forward` gives them,
        and a (P,) logit for each candidate at its place in a history."""
        if isinstance(self.fusion, EarlyFusion):
            outputs_TD, hidden_PI = self._with_probes(
                vectors_TD, history, self._at_input(candidates_PD), probes
            )
            return outputs_TD, self.fusion(hidden_PI)
        outputs_TD, users_PD = self._with_user_tokens(vectors_TD, history, probes)
        return outputs_TD, self.late_fusion(users_PD, candidates_PD)

    def scores(
        self,
        vectors_TD: Tensor,
        history: History,
        candidates_PD: Tensor,
        items_P: npt.NDArray[np.int64],
        question_P: npt.NDArray[np.int64],
        after_Q: npt.NDArray[np.int64],
        asked_Q: npt.NDArray[np.int64],
    ) -> Tensor:
        """(P,) logits of candidates. Question q is asked after event `after_Q[q]` of the T (not decreasing
        from one history to the next), at the second `asked_Q[q]`; candidate p belongs to question
        `question_P[p]` (not decreasing). However many there are, every event is computed once."""
        if isinstance(self.fusion, EarlyFusion):
            probes = Probes.after(history.packing, after_Q[question_P], items_P, asked_Q[question_P])
            return self.judge(vectors_TD, history, candidates_PD, probes)[1]
        users_QD = self.user_token_vectors(vectors_TD, history, after_Q, asked_Q)
        return self.late_fusion(users_QD[on_device(question_P, users_QD.device)], candidates_PD)

    def user_token_vectors(
        self,
        vectors_TD: Tensor,
        history: History,
        after_Q: npt.NDArray[np.int64],
        asked_Q: npt.NDArray[np.int64],
    ) -> Tensor:
        """Late fusion's user vectors, the outputs at [USER] after those events: (Q, D), unit length."""
        nothing_Q = np.full(len(after_Q), UNKNOWN_ITEM)
        probes = Probes.after(history.packing, after_Q, nothing_Q, asked_Q)
        return self._with_user_tokens(vectors_TD, history, probes)[1]

    @property
    def late_fusion(self) -> LateFusion:
        """Raises: ValueError, where the model was not trained to judge by user vectors."""
        if not isinstance(self.fusion, LateFusion):
            raise ValueError(f"a model of hllm.objective = {self.objective!r} has no [USER] vector")
        return self.fusion

    def _with_user_tokens(
        self, vectors_TD: Tensor, history: History, probes: Probes
    ) -> tuple[Tensor, Tensor]:
        tokens_PI = self.late_fusion.user_token.expand(len(probes.sequence_P), -1)
        outputs_TD, hidden_PI = self._with_probes(vectors_TD, history, tokens_PI, probes.without_items())
        return outputs_TD, self._as_items(hidden_PI)

    def _with_probes(
        self, vectors_TD: Tensor, history: History, inputs_PI: Tensor, probes: Probes
    ) -> tuple[Tensor, Tensor]:
        """(T, D) next-interest vectors, and the (P, I) hidden states at the probes."""
        inputs_XI = torch.cat(
            [
                self._told(self._at_input(vectors_TD), history.items_T, history.times_T),
                self._told(inputs_PI, probes.items_P, probes.times_P),
            ]
        )
        packing = ProbedPacking(history.packing, probes, inputs_XI.device)
        hidden_XI = run_packed(self.decoder, inputs_XI, packing)
        hidden_TI, hidden_PI = hidden_XI.split([history.packing.tokens, len(probes.sequence_P)])
        return self._as_items(hidden_TI), hidden_PI

    def _at_input(self, vectors_TD: Tensor) -> Tensor:
        inputs_TI = self.into(vectors_TD) if self.inside != self.width else vectors_TD
        return inputs_TI * self.input_scale

    def _told(
        self, inputs_TI: Tensor, items_T: npt.NDArray[np.int64], times_T: npt.NDArray[np.int64]
    ) -> Tensor:
        """Inputs with what else the User LLM is told of each event (HLLM, algorithm 1 and table 12)."""
        if self.features is not None:
            for feature_TI in self.features(items_T, times_T):
                inputs_TI = inputs_TI + feature_TI
        return inputs_TI

    def _as_items(self, hidden_TI: Tensor) -> Tensor:
        hidden_TD = self.out(hidden_TI) if self.inside != self.width else hidden_TI
        return F.normalize(hidden_TD.float(), dim=-1)


def drop_out(decoder: Any, share: float) -> None:
    """Dropout on the inputs of a decoder and on what each of its layers adds, while it is trained."""
    if not share:
        return

    def inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        dropped = F.dropout(kwargs["inputs_embeds"], share, module.training)
        return args, {**kwargs, "inputs_embeds": dropped}

    def added(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention also returns its weights
            return (F.dropout(output[0], share, module.training), *output[1:])
        return F.dropout(output, share, module.training)

    decoder.register_forward_pre_hook(inputs, with_kwargs=True)
    for layer in decoder.layers:
        layer.self_attn.register_forward_hook(added)
        layer.mlp.register_forward_hook(added)
