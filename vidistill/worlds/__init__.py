"""The bundled worlds: where their clips come from."""
