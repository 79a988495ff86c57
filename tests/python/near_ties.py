"""In bfloat16 two right implementations may part where two tokens are all but equally likely: how to tell."""

NEAR_TIE = 0.125  # logits: a step of bfloat16 between 16 and 32, where this model's largest logits lie


def first_difference(a, b):
    """Index of the first token that differs, None if there is none."""
    if a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check(name, ours, reference, gap_at):
    """Equal tokens, or a first difference where the reference's two best logits are within NEAR_TIE.

    gap_at(i): that distance at token i of the reference. Returns a line for people.
    """
    at = first_difference(ours, reference)
    if at is None:
        return f"{name}: all {len(reference)} tokens equal"
    gap = gap_at(at)
    line = f"{name}: differs at token {at} of {len(reference)}, where the two best are {gap:.4f} apart"
    assert gap <= NEAR_TIE, line
    return line
