"""Devices and processes: the mesh, how arrays lie on it, how several processes act as one."""
