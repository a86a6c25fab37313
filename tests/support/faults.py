"""Make the compression of chosen requests fail, inside a running engine or by a broken prompt."""

from dataclasses import replace

FAULTS = {
    "raises": "failed",  # a scorer
    "memory": "failed",  # none left while it scores
    "shape": "failed",  # scores of another one
    "late": "failed",  # while pages are written
    "nan": "not_finite",
    "inf": "not_finite",
    "unsound": "not_finite",  # seen on the device, as on a GPU
}
"""What can go wrong, and what a request is counted under then."""

REPEAT_FAULT = "repeat"  # the model fails while it repeats the prompt; likewise "failed"


def inject_faults(worker, faults):
    """Let a worker fail; for ``collective_rpc``.

    Args:
        worker: ours; of several ranks the last one fails, of several pipeline stages the first.
        faults: request number, as it begins the request's id, to one of :data:`FAULTS`, or to
            :data:`REPEAT_FAULT`.
    """
    import torch
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    last = worker.parallel_config.tensor_parallel_size - 1
    if get_tensor_model_parallel_rank() != last or not get_pp_group().is_first_rank:
        return
    compression = worker._kvzip._compression
    compressor = compression._compressor
    scorer, store = compressor._scorer, compressor._store
    compress_one, score_layer = compression._compress_one, scorer.score_layer
    compact = store.compact
    fault = None

    def faulty_compress_one(request, repeated):
        nonlocal fault
        fault = faults.get(request.request_id.split("-")[0])
        prefix, stages = compress_one(request, repeated)
        if fault == "unsound":
            prefix = replace(prefix, sound=torch.tensor(False))
        return prefix, stages

    def faulty_score_layer(inputs):
        scores = score_layer(inputs)
        if inputs.layer == 1:
            if fault == "raises":
                raise KeyError("a scorer's own fault\nin two lines")
            if fault == "memory":
                raise torch.OutOfMemoryError("no memory left")
            if fault == "shape":
                return scores[:, :-1]
            if fault in ("nan", "inf"):
                scores = scores.clone()
                scores[1, 7] = float(fault)
        return scores

    def faulty_compact(sources, keep, targets):
        compact(sources, keep, targets)
        if fault == "late":
            raise RuntimeError("no memory left")

    if compression.repeats is not None:
        break_repeats(compression.repeats, faults)
    compression._compress_one = faulty_compress_one
    scorer.score_layer = faulty_score_layer
    store.compact = faulty_compact


def break_repeats(repeats, faults):
    """Let the model fail on the second chunk of chosen requests, whoever shares the pass."""
    begin, go_on = repeats._begin, repeats.reconstruction.go_on
    broken = []

    def remembering_begin(request, **how):
        found = begin(request, **how)
        if faults.get(request.request_id.split("-")[0]) == REPEAT_FAULT:
            broken.append(found.context)
        return found

    def faulty_go_on(work):
        if any(context in broken and context.num_done for context, _ in work):
            raise RuntimeError("the model fails")
        go_on(work)

    repeats._begin = remembering_begin
    repeats.reconstruction.go_on = faulty_go_on


def broken_embeddings(request, llm):
    """A request's prompt as embeddings ``[T, hidden size]``; that of one token is ``embeds``."""
    import torch

    model = llm.llm_engine.model_config
    prompt = torch.full((len(request.prompt), model.get_hidden_size()), 0.1, dtype=model.dtype)
    prompt[len(prompt) // 2] = float(request.embeds)
    return prompt
