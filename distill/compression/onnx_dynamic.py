"""From integer weights alone to integer convolutions, in an ONNX file: inputs are rounded by the range of each pass."""

from pathlib import Path


def round_inputs(file: Path) -> int:
    """Changes an ONNX file so that its convolutions with integer weights compute on integers.

    What comes in is rounded to 256 values between its least and its largest, over the whole batch; what goes out is
    float again.

    Args:
        file: its integer weights, int8 and symmetric, go through a DequantizeLinear each.

    Returns:
        The number of convolutions.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(file)
    graph, constants = model.graph, {entry.name: entry for entry in model.graph.initializer}
    float_again = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    rounded: dict[str, tuple[str, str, str]] = {}
    nodes, scales, replaced = [], {}, 0
    for node in graph.node:
        weight = float_again.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None:
            nodes.append(node)
            continue
        source, name = node.input[0], node.output[0]
        if source not in rounded:
            rounded[source] = tuple(f"{source}_{part}" for part in ("rounded", "step", "zero"))
            nodes.append(helper.make_node("DynamicQuantizeLinear", [source], rounded[source]))
        integers, step, zero = rounded[source]
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        columns = {"scale": weight.input[1]} | ({"bias": node.input[2]} if len(node.input) > 2 else {})
        for part, constant in columns.items():
            values = numpy_helper.to_array(constants[constant]).reshape(-1, 1, 1)
            scales[f"{name}_{part}"] = numpy_helper.from_array(values, f"{name}_{part}")
        nodes += [
            helper.make_node("ConvInteger", [integers, weight.input[0], zero], [f"{name}_sums"], **attributes),
            helper.make_node("Cast", [f"{name}_sums"], [f"{name}_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [step, f"{name}_scale"], [f"{name}_steps"]),
        ]
        scaled = f"{name}_scaled" if "bias" in columns else name
        nodes.append(helper.make_node("Mul", [f"{name}_float", f"{name}_steps"], [scaled]))
        if "bias" in columns:
            nodes.append(helper.make_node("Add", [scaled, f"{name}_bias"], [name]))
        replaced += 1
    read = {name for node in nodes for name in node.input}
    nodes = [node for node in nodes if node.op_type != "DequantizeLinear" or node.output[0] in read]
    read = {name for node in nodes for name in node.input}
    kept = [entry for entry in (*graph.initializer, *scales.values()) if entry.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    onnx.save(model, file)
    return replaced
