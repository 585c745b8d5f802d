"""A car on a track, seen from above: CarRacing of Gymnasium, recorded by `vidistill data gym` as any environment is."""
