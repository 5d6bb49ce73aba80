"""Stand-ins in Triton for the compiled operations of vLLM that a dense model asks for.

vLLM's compiled part is too large to bring along. Attention and K/V writes are Triton kernels of
vLLM's own already (`TRITON_ATTN`); norms, SiLU and rotary embedding are here.
"""
