"""stub"""
from .dilated_attention_reference import dilated_attention_reference
def dilated_attention(*args, backend=None, **kwargs):
    return dilated_attention_reference(*args, **kwargs)
