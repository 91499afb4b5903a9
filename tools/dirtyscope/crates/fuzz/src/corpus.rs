// SPDX-License-Identifier: GPL-2.0-only

//! Sequences that have reached new code of the kernel, and what is made of them.

use proptest::prelude::{Rng, RngCore};
use testbed::Op;

/// Operations that a mutation adds at most, but for the one that replaces all that follows.
const ADDED: usize = 8;

/// Sequences worth to go on from, in the order in which they were found.
#[derive(Default)]
pub struct Corpus(Vec<Vec<Op>>);

impl Corpus {
    /// Keeps a sequence that reached something new.
    pub fn keep(&mut self, program: Vec<Op>) {
        self.0.push(program);
    }

    /// A variant of one of these: operations inserted, replaced or left out, or what follows taken from
    /// another or made anew. `make` makes so many operations at most, to follow what is given.
    /// The result may not be possible. `None` if it is better to begin anew.
    pub fn variant(
        &self,
        rng: &mut impl RngCore,
        mut make: impl FnMut(&[Op], usize) -> Vec<Op>,
    ) -> Option<Vec<Op>> {
        // From time to time something that owes nothing to what there is.
        if self.0.is_empty() || rng.random_ratio(1, 4) {
            return None;
        }
        let one = &self.0[self.favoured(rng)];
        let at = rng.random_range(0..=one.len());
        let gone = rng.random_range(1..=ADDED).min(one.len() - at);
        let mut variant = one[..at].to_vec();
        match rng.random_range(0..5) {
            0 => {
                variant.extend(make(&one[..at], ADDED));
                variant.extend_from_slice(&one[at..]);
            }
            1 => {
                variant.extend(make(&one[..at], gone.max(1)));
                variant.extend_from_slice(&one[at + gone..]);
            }
            2 => variant.extend_from_slice(&one[at + gone..]),
            3 => {
                let other = &self.0[self.favoured(rng)];
                variant.extend_from_slice(&other[rng.random_range(0..=other.len())..]);
            }
            _ => variant.extend(make(&one[..at], usize::MAX)),
        }
        Some(variant)
    }

    /// One of them, half of the time one of the newest quarter: what was found late is rare.
    fn favoured(&self, rng: &mut impl RngCore) -> usize {
        let count = self.0.len();
        let first = if rng.random() { count - count.div_ceil(4) } else { 0 };
        rng.random_range(first..count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::runner;

    #[test]
    fn variants_are_made_of_what_is_kept() {
        let mut runner = runner(1);
        let rng = runner.rng();
        let mut corpus = Corpus::default();
        assert!(corpus.variant(rng, |_, _| vec![Op::Stop]).is_none());
        corpus.keep(vec![Op::Start; 10]);
        corpus.keep(vec![Op::Check; 10]);
        let mut made = [false; 4];
        for _ in 0..1000 {
            let Some(variant) =
                corpus.variant(rng, |before, _| vec![Op::Stop; before.len().min(3)])
            else {
                continue;
            };
            let has = |op: &Op| variant.contains(op);
            made[0] |= has(&Op::Stop) && variant.len() > 10;
            made[1] |= has(&Op::Start) && has(&Op::Check);
            made[2] |= !has(&Op::Stop) && (2..10).contains(&variant.len());
            made[3] |= has(&Op::Stop) && variant.last() != Some(&Op::Stop);
        }
        assert_eq!(made, [true; 4]);
    }
}
