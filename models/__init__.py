"""Teachers, students, detectors, training, calibration, evaluation, registry. A leaf: no redis, no ray."""
