"""The embedded world: scenes of OpenMoji sprites of which everything true is known; `writer.KINDS` lists the kinds."""
