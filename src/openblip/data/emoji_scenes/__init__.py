"""The embedded world: scenes of OpenMoji sprites with every true caption known, clean or with alt-text noise."""
