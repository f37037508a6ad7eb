"""The operator ``Linear``, this project's own: what it means in standard operators. Knows the builder.

Inputs x [.., c], W and, if there is one, a bias [o]; output [.., o]. Attributes: ``transposed``, 1 where W is [o, c] as
torch has it, 0 where it is [c, o]; ``shape``, the output's shape with -1 for the axis that grows with the batch.
"""

from __future__ import annotations

from onnx import helper

from edgetune.autodiff.builder import GraphBuilder
from edgetune.autodiff.graph import Node


def emit_linear(g: GraphBuilder, node: Node) -> None:
    """Emit a Linear node as one matrix product over all rows; both changes of shape are views."""
    shape = [int(extent) for extent in node.attributes["shape"]]
    x, *rest = node.inputs
    if len(shape) == 2:
        rows, product = x, node.outputs[0]
    else:
        rows = g.op("Flatten", x, axis=len(shape) - 1, hint="rows")
        product = g.fresh("product")
    inputs = [rows, *(name for name in rest if name)]
    name = node.name if len(shape) == 2 else product
    g.nodes.append(helper.make_node("Gemm", inputs, [product], name=name, transB=int(node.attributes["transposed"])))
    if len(shape) > 2:
        g.nodes.append(helper.make_node("Reshape", [product, g.const(shape)], list(node.outputs), name=node.name))
