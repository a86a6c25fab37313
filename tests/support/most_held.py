"""An upper bound of what one request holds, to hold compressions against."""

from math import ceil

SPARE_BLOCKS = 2


def most_blocks(rule, num_prompt_tokens, options):
    """The most blocks a request holds, however much it generates; None without a budget."""
    budget = rule.decode_budget(options)
    if rule.prefill_blocks is not None or budget is None:
        return None if options.is_off else rule.peak_blocks
    plan = rule.plan(num_prompt_tokens, options)
    kept = plan.num_compressed_blocks if plan else 0
    of_prompt = ceil(num_prompt_tokens / rule.block_size)
    step = max(1, budget // 2) + ceil(rule.num_guessed_tokens / rule.block_size)
    return max(of_prompt, kept, budget + step) + max(kept, budget) + step + SPARE_BLOCKS
