"""Small tools that know nothing of the method: configs from mappings, whole files, optional packages."""
