"""The embedded world: scenes of OpenMoji sprites with every true caption known, clean or noisy.

`writer.write_emoji_scenes` writes shards. Its steps serve tasks that need scenes of their own:
`scene.draw_scene`, `phrasing.references`, `rendering.render`.
"""
