"""Rewrites one source file written for CUDA so that it runs on a CPU (see `import_hook`)."""

import ast

# The module that stands in for torch.cuda, and the name under which rewritten code finds it.
SHIM_MODULE = "megatron_vl.device.cuda_shim"
SHIM_NAME = "_cuda_shim"

# Packages that need a GPU to be imported, or to be of use (many images have them while the host has no GPU); and
# wandb, which megatron-core's inference imports for seconds, and nothing here reaches through it.
_LEFT_OUT = {"transformer_engine", "transformer_engine_torch", "apex", "flash_attn", "flash_attn_3", "wandb"}


def rewrite_for_cpu(source: bytes | str, filename: str) -> ast.Module:
    """The syntax tree of `source` with every use of CUDA turned to the CPU.

    The tree reads the global `SHIM_NAME`, which the caller puts into the module before running it.

    Raises:
        SyntaxError: `source` is no Python.
    """
    tree = ast.parse(source, filename)
    _CudaToCpu().visit(tree)  # changes the tree in place
    return tree


class _CudaToCpu(ast.NodeTransformer):
    """Each method is one rule of the rewrite."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`torch.cuda` -> the shim."""
        self.generic_visit(node)
        if node.attr == "cuda" and _is_torch(node.value):
            return ast.copy_location(ast.Name(SHIM_NAME, node.ctx), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`x.cuda(device, non_blocking=True)` -> `x.to("cpu", non_blocking=True)`."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr = "to"
            node.args = [ast.copy_location(ast.Constant("cpu"), node)]
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "device"]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """`"cuda"` -> `"cpu"`, and `"torch.cuda.FloatTensor"` -> `"torch.FloatTensor"`."""
        if node.value == "cuda":
            node.value = "cpu"
        elif isinstance(node.value, str) and _names_tensor_type(node.value):
            node.value = node.value.replace("torch.cuda.", "torch.")
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        """`from torch.cuda import x` -> from the shim; from a package that is left out -> not installed."""
        if node.module == "torch.cuda":
            node.module = SHIM_MODULE
        elif node.level == 0 and node.module is not None and _is_left_out(node.module):
            return _raise_not_found(node, node.module)
        return node

    def visit_Import(self, node: ast.Import) -> ast.AST:
        """`import transformer_engine` -> not installed, which megatron-core is prepared for."""
        for alias in node.names:
            if _is_left_out(alias.name):
                return _raise_not_found(node, alias.name)
        return node


def _is_torch(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "torch"


def _names_tensor_type(text: str) -> bool:
    return text.startswith("torch.cuda.") and text.endswith("Tensor") and text.count(".") == 2


def _is_left_out(module: str) -> bool:
    return module.split(".")[0] in _LEFT_OUT


def _raise_not_found(node: ast.stmt, module: str) -> ast.stmt:
    """`raise ModuleNotFoundError(...)` in the place of `node`."""
    message = f"{module} is not imported on a host without CUDA"
    replacement = ast.parse(f"raise ModuleNotFoundError({message!r}, name={module!r})").body[0]
    for part in ast.walk(replacement):
        ast.copy_location(part, node)
    return replacement
