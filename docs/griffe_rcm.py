"""What griffe, which reads the code and imports nothing, is told of it to document it."""

import griffe


class Reader(griffe.Extension):
    def on_package(self, *, pkg, loader, **kwargs):
        """rcm_jax.kernels is the folder kernels/ at the top of the checkout."""
        if pkg.name == "rcm_jax":
            pkg.set_member("kernels", loader.load("kernels"))

    def on_attribute_instance(self, *, attr, **kwargs):
        """A comment behind a field of a class is its docstring."""
        comment = attr.source.partition("  # ")[2]
        if attr.parent.is_class and not attr.docstring and comment:
            attr.docstring = griffe.Docstring(comment.strip(), lineno=attr.lineno, parent=attr)

    def on_class_members(self, *, cls, **kwargs):
        """The fields of a NamedTuple are what it is made from."""
        if "NamedTuple" in map(str, cls.bases):
            kind = griffe.ParameterKind.positional_or_keyword
            fields = (
                griffe.Parameter(name, annotation=field.annotation, kind=kind, default=field.value)
                for name, field in cls.attributes.items()
                if "property" not in field.labels
            )
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*fields)))
