// SPDX-License-Identifier: GPL-2.0-only

//! Where an IOVA is in a picture, in percent of its width.
//!
//! A page must be seen beside a mapping of thousands, so widths grow with the square root of sizes,
//! between one IOVA where something begins or ends and the next. What nobody uses is left out, but for
//! a gap that says so.

/// Percent of the width that all gaps have at most, and that one has.
const GAPS: f64 = 35.0;
const GAP: f64 = 4.0;

/// What a size is measured in, before it is drawn.
const UNIT: f64 = 4096.0;

pub struct Scale {
    /// An IOVA and its place, ascending.
    places: Vec<(u64, f64)>,
    /// Ranges that are left out.
    gaps: Vec<(u64, u64)>,
}

impl Scale {
    /// Of ranges that are used, and others whose begin and end are of interest.
    pub fn new(used: &[(u64, u64)], others: &[(u64, u64)]) -> Option<Self> {
        let all = used.iter().chain(others);
        let mut edges: Vec<_> = all.flat_map(|range| [range.0, range.1]).collect();
        edges.sort_unstable();
        edges.dedup();
        let mut used = used.to_vec();
        used.sort_unstable();
        let mut reach = 0;
        let mut next = used.iter().peekable();
        let mut parts = Vec::new();
        for pair in edges.windows(2) {
            while let Some(range) = next.next_if(|range| range.0 <= pair[0]) {
                reach = reach.max(range.1);
            }
            parts.push((pair[0], pair[1], reach >= pair[1]));
        }
        let size =
            |&(start, end, _): &(u64, u64, bool)| ((end - start) as f64 / UNIT).max(1.0).sqrt();
        let gaps: Vec<_> = parts.iter().filter(|part| !part.2).map(|p| (p.0, p.1)).collect();
        let total: f64 = parts.iter().filter(|part| part.2).map(size).sum();
        let gap = if total > 0.0 {
            GAP.min(GAPS / gaps.len().max(1) as f64)
        } else {
            100.0 / gaps.len().max(1) as f64
        };
        let rest = 100.0 - gap * gaps.len() as f64;
        let mut at = 0.0;
        let mut places = vec![(*edges.first()?, 0.0)];
        for part in &parts {
            at += if part.2 { size(part) / total * rest } else { gap };
            places.push((part.1, at));
        }
        Some(Self { places, gaps })
    }

    /// Where an IOVA is.
    pub fn at(&self, iova: u64) -> f64 {
        let after = self.places.partition_point(|place| place.0 <= iova);
        match (after.checked_sub(1).map(|i| self.places[i]), self.places.get(after)) {
            (Some(left), Some(right)) => {
                let part = (iova - left.0) as f64 / (right.0 - left.0) as f64;
                left.1 + part * (right.1 - left.1)
            }
            (Some(last), None) => last.1,
            (None, _) => 0.0,
        }
    }

    /// Ranges that are left out.
    pub fn gaps(&self) -> &[(u64, u64)] {
        &self.gaps
    }

    /// IOVAs to name, so many at most and not too near to one another: those of `first`, then others.
    pub fn ticks(&self, first: &[u64], count: usize) -> Vec<(u64, f64)> {
        let room = 100.0 / count as f64;
        let mut ticks = Vec::<(u64, f64)>::new();
        let others = self.places.iter().map(|place| place.0);
        for iova in first.iter().copied().chain(others) {
            let at = self.at(iova);
            if ticks.iter().all(|tick| (tick.1 - at).abs() >= room) {
                ticks.push((iova, at));
            }
        }
        ticks.sort_unstable_by_key(|tick| tick.0);
        ticks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_small_and_pages_can_be_seen() {
        let scale = Scale::new(
            &[(0x1000, 0x2000), (0x2000, 0x40_0000), (1 << 40, (1 << 40) + 0x1000)],
            &[(0, u64::MAX)],
        )
        .unwrap();
        assert_eq!(
            scale.gaps(),
            [(0, 0x1000), (0x40_0000, 1 << 40), ((1 << 40) + 0x1000, u64::MAX)]
        );
        assert_eq!((scale.at(0), scale.at(u64::MAX).round()), (0.0, 100.0));
        assert!(scale.at(0x2000) - scale.at(0x1000) > 1.0);
        assert!(scale.at(1 << 40) - scale.at(0x40_0000) < 5.0);
        let ticks = scale.ticks(&[0x1000], 5);
        assert!(ticks.len() <= 6 && ticks.iter().any(|tick| tick.0 == 0x1000), "{ticks:?}");
        assert!(Scale::new(&[], &[]).is_none());
    }
}
