"""Functions that work element by element: what comes out at a place depends on what stands at that place alone.

Their tensor arguments are broadcast, aligned from the right. The list was taken from ``torch.Tag.pointwise`` and read; by
hand came aliases, conversions, and what is elementwise in its gradient: masks (dropout, ``tril``) and noise hold no samples.
"""

import torch

from adam_ghost.capture.names import functions

_TAGGED = """
    abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not
    bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clip clone conj_physical copysign cos
    cosh deg2rad digamma div elu eq erf erfc erfinv exp exp2 expm1 float_power floor fmax fmin fmod frac frexp gcd ge gelu
    gt hardshrink hardsigmoid hardtanh heaviside hypot i0 igamma igammac isfinite isinf isnan isneginf isposinf lcm ldexp
    le leaky_relu lerp lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    logit lt masked_fill maximum minimum mish mul mvlgamma nan_to_num ne neg nextafter polygamma positive pow rad2deg
    reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink
    sqrt square sub tan tanh threshold true_divide trunc where xlogy
"""
_SPECIAL = """
    airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v
    chebyshev_polynomial_w digamma entr erf erfc erfcx erfinv exp2 expit expm1 gammainc gammaincc gammaln
    hermite_polynomial_h hermite_polynomial_he i0 i0e i1 i1e laguerre_polynomial_l legendre_polynomial_p log1p log_ndtr
    logit modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1 multigammaln ndtr ndtri polygamma psi
    round scaled_modified_bessel_k0 scaled_modified_bessel_k1 shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u
    shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w sinc spherical_bessel_j0 xlog1py xlogy zeta
"""
_ALIASES = """
    absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh divide fix floor_divide greater greater_equal less
    less_equal multiply negative not_equal subtract isclose isreal
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __floordiv__
    __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__ __and__ __rand__ __or__ __ror__
    __xor__ __rxor__ __lshift__ __rlshift__ __rshift__ __rrshift__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__
    __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ifloordiv__ __imod__ __ipow__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__
"""
_ACTIVATIONS = "hardswish logsigmoid rrelu softsign tanhshrink"
# their results depend on how an element is held, not on its neighbours
_CONVERSIONS = """
    bfloat16 bool byte cdouble cfloat chalf char conj contiguous cpu cuda detach double float half imag int long pin_memory
    real requires_grad_ resolve_conj resolve_neg short to type type_as complex polar
"""
_MASKS_AND_NOISE = """
    alpha_dropout bernoulli dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout tril triu
    fill_ zero_ copy_ bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_
    empty_like full_like ones_like rand_like randint_like randn_like zeros_like broadcast_tensors
"""
# without a reduction; a loss that was reduced has another shape
_LOSSES = """
    binary_cross_entropy binary_cross_entropy_with_logits hinge_embedding_loss huber_loss kl_div l1_loss
    margin_ranking_loss mse_loss poisson_nll_loss smooth_l1_loss soft_margin_loss
"""

POINTWISE = frozenset(
    f
    for names in (_TAGGED, _ALIASES, _ACTIVATIONS, _CONVERSIONS, _MASKS_AND_NOISE, _LOSSES)
    for name in names.split()
    for f in (*functions(name), *functions(f"{name}_"))
) | frozenset(f for name in _SPECIAL.split() for f in functions(f"special.{name}"))

# of two tensors; with a dimension, or alone, they reduce
POINTWISE_IF_TWO = frozenset((*functions("torch.max"), *functions("Tensor.max"), *functions("torch.min"), *functions("Tensor.min")))

# what they make holds no samples, whatever tensor they are asked by
FACTORIES = frozenset(f for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros") for f in functions(name))

POINTWISE |= frozenset(getattr(torch.Tensor, name).__get__ for name in ("data", "real", "imag"))
