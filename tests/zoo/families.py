"""All architectures of the zoo, by the library that has them."""

from architecture import Architecture
from from_timm import TIMM
from from_transformers import TRANSFORMERS
from plain import PLAIN

LIBRARIES: dict[str, dict[str, Architecture]] = {"transformers": {**TRANSFORMERS}, "timm": {**TIMM}, "torch": {**PLAIN}}
FAMILIES: dict[str, Architecture] = {name: family for families in LIBRARIES.values() for name, family in families.items()}

# what is left out, and why
EXCEPTIONS = {
    "`RecurrentGemma` (transformers)": "its recurrent layers leave their states, with a graph, on the module, and take a square"
    " root by a function of their own: their parameters are named as not attributed",
    "`xcit`, `levit` (timm)": "torch's own backward pass of a batch norm by running statistics is another one for a batch than"
    " for its samples where the gradient is not contiguous (CPU, torch 2.13): the batch's gradient is not the samples' sum",
}
