"""STUB, replaced by the merge."""


def local(t):
    return t.to_local() if hasattr(t, "to_local") else t


def is_sharded(model):
    return any(hasattr(p, "to_local") for p in model.parameters())


def first_row(t):
    return 0


def owns_shard(t, main):
    return main


def full_state_dict(model, keep):
    tied = getattr(model, "all_tied_weights_keys", {})
    return {n: v.contiguous() for n, v in model.state_dict().items() if n not in tied} if keep else {}


def require_equal_replicas(*a, **k):
    pass


def shard_model(*a, **k):
    raise NotImplementedError
