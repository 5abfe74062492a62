//! Angles of rotary positions, and how each way of stretching a context changes them. Pure.

/// Angles per position: base^(-2 i / dim), computed in f32 as transformers does.
pub(super) fn base_frequencies(base: f32, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| 1.0 / base.powf((2 * i) as f32 / dim as f32))
        .collect()
}

/// LongRoPE's attention factor (Ding et al. 2024, arXiv:2402.13753).
pub(super) fn longrope_factor(context: usize, original: usize) -> f32 {
    let ratio = context as f64 / original as f64;
    if ratio <= 1.0 {
        1.0
    } else {
        (1.0 + ratio.ln() / (original as f64).ln()).sqrt() as f32
    }
}

/// YaRN (Peng et al. 2023, arXiv:2309.00071): long waves are stretched, short ones kept, by how often they turn.
pub(super) struct Yarn {
    pub(super) factor: f32,
    pub(super) original: f32,
    /// Turns within the original context from which on a wave is kept, and to which it is stretched.
    pub(super) fast: f32,
    pub(super) slow: f32,
    /// Their places are rounded to whole ones.
    pub(super) truncate: bool,
}

impl Yarn {
    pub(super) fn scale(&self, base: f32, frequencies: &mut [f32]) {
        let dim = 2.0 * frequencies.len() as f64;
        let place = |turns: f32| {
            let waves = f64::from(self.original) / (f64::from(turns) * 2.0 * std::f64::consts::PI);
            dim * waves.ln() / (2.0 * f64::from(base).ln())
        };
        let (mut low, mut high) = (place(self.fast), place(self.slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        for (i, f) in frequencies.iter_mut().enumerate() {
            let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            *f = *f / self.factor * ramp + *f * (1.0 - ramp);
        }
    }
}

/// What YaRN multiplies cosines and sines by.
pub(super) fn yarn_factor(factor: f32, scale: f32) -> f32 {
    match factor <= 1.0 {
        true => 1.0,
        false => (0.1 * f64::from(scale) * f64::from(factor).ln() + 1.0) as f32,
    }
}

/// Llama 3.1's scaling: long wavelengths divided, short ones kept, a smooth passage between.
pub(super) fn llama3_frequency(f: f32, original: f32, factor: f32, low: f32, high: f32) -> f32 {
    let wavelength = 2.0 * std::f32::consts::PI / f;
    if wavelength > original / low {
        return f / factor;
    }
    if wavelength < original / high {
        return f;
    }
    let smooth = (original / wavelength - low) / (high - low);
    (1.0 - smooth) * f / factor + smooth * f
}
