// SPDX-License-Identifier: GPL-2.0-only

//! What many measurements say.

use serde::Serialize;

/// The middle one of `samples`, or the mean of the two in the middle. NaN if there are none.
pub fn median(samples: &[f64]) -> f64 {
    let sorted = sorted(samples);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// A median, and between what it lies with a confidence of 95 %.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Estimate {
    /// Of independent samples, whatever their distribution: how many of them are below its median is
    /// binomial.
    pub fn of(samples: &[f64]) -> Self {
        let sorted = sorted(samples);
        let n = sorted.len();
        let rank = (n as f64 / 2.0 - 0.98 * (n as f64).sqrt()).max(0.0) as usize;
        let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
        Self { median: median(samples), low: at(rank), high: at(n.saturating_sub(1 + rank)) }
    }
}

/// The exponent `e` of the law `y = a * x^e` that fits best: the slope of the line through the
/// logarithms, by least squares.
pub fn exponent(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<_> = points.iter().map(|&(x, y)| (x.ln(), y.ln())).collect();
    let n = logs.len() as f64;
    let mean_x = logs.iter().map(|&(x, _)| x).sum::<f64>() / n;
    let mean_y = logs.iter().map(|&(_, y)| y).sum::<f64>() / n;
    let covariance: f64 = logs.iter().map(|&(x, y)| (x - mean_x) * (y - mean_y)).sum();
    let variance: f64 = logs.iter().map(|&(x, _)| (x - mean_x).powi(2)).sum();
    covariance / variance
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn estimates_ignore_outliers() {
        let mut samples: Vec<f64> = (1..=100).map(f64::from).collect();
        samples[99] = 1e9;
        // As tables of the binomial distribution have it: the 41st and the 60th of 100, rounded
        // away from the median.
        let Estimate { median, low, high } = Estimate::of(&samples);
        assert_eq!((median, low, high), (50.5, 41.0, 60.0));
        assert_eq!(Estimate::of(&[1.0]), Estimate { median: 1.0, low: 1.0, high: 1.0 });
    }

    #[test]
    fn exponents() {
        let law = |e: f64| [1.0, 10.0, 1000.0].map(|x: f64| (x, 7.0 * x.powf(e)));
        for e in [0.0, 0.5, 1.0, 2.0] {
            assert!((exponent(&law(e)) - e).abs() < 1e-9, "{e}");
        }
    }
}
