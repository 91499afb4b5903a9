// SPDX-License-Identifier: GPL-2.0-only

//! What the generator writes: see the uapi header.
//!
//! The driver has an implementation of its own; scenarios hold memory against this one.

use crate::{
    MdevDma, PAGE, Result, Width,
    pattern::{STEP, mix},
    uapi,
};

const STRIDE: u64 = uapi::RUST_MDEV_DMA_GEN_STRIDE as u64;

/// What the generator is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Where its window begins.
    pub iova: u64,
    /// Bytes of the window.
    pub length: u64,
    /// What order and contents follow from.
    pub seed: u64,
    /// Writes after which it stops by itself; 0: never.
    pub limit: u64,
    /// Pages per second; 0: as fast as it can.
    pub rate: u32,
    /// `RUST_MDEV_DMA_GEN_*`
    pub mode: u32,
}

impl Program {
    /// Pages of the window.
    pub fn pages(&self) -> u64 {
        self.length / PAGE
    }

    /// The IOVA of the page that write `n` goes to.
    pub fn page(&self, n: u64) -> u64 {
        let pages = self.pages();
        self.iova + (n % pages * STRIDE + mix(self.seed) % pages) % pages * PAGE
    }

    /// The seed of the pattern that write `n` puts there.
    pub fn seed(&self, n: u64) -> u64 {
        mix(self.seed.wrapping_add(n.wrapping_add(1).wrapping_mul(STEP)))
    }

    /// How write `n` is made: a bit of the mode.
    pub fn way(&self, n: u64) -> u32 {
        let ways: Vec<u32> =
            (0..u32::BITS).map(|bit| 1 << bit).filter(|way| self.mode & way != 0).collect();
        let turn = (n % self.pages() + n / self.pages()) % ways.len() as u64;
        ways[turn as usize]
    }

    /// What the window contains once GEN_COUNTER is `counter`: the IOVA and the seed of each page
    /// that was written.
    pub fn contents(&self, counter: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = counter.saturating_sub(self.pages());
        (first..counter).map(|n| (self.page(n), self.seed(n)))
    }
}

/// How far the generator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// `EINPROGRESS` while it runs, else 0 or the errno that stopped it.
    pub status: u32,
    /// Writes made.
    pub counter: u64,
}

impl MdevDma {
    /// Starts the generator.
    pub fn start_generator(&self, program: &Program) -> Result<()> {
        self.control_generator(uapi::RUST_MDEV_DMA_GEN_START, program)
    }

    /// Has the generator do `program`, counting on from where it stands.
    pub fn continue_generator(&self, program: &Program) -> Result<()> {
        self.control_generator(uapi::RUST_MDEV_DMA_GEN_CONTINUE, program)
    }

    /// Stops the generator; it writes no more.
    pub fn stop_generator(&self) -> Result<Progress> {
        let stop = uapi::RUST_MDEV_DMA_GEN_STOP;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_CONTROL, Width::Long, stop.into())?;
        self.generator()
    }

    /// How far the generator is. While it runs, it may be further by now.
    pub fn generator(&self) -> Result<Progress> {
        Ok(Progress {
            status: self.read(uapi::RUST_MDEV_DMA_REG_GEN_STATUS, Width::Long)? as u32,
            counter: self.read(uapi::RUST_MDEV_DMA_REG_GEN_COUNTER, Width::Quad)?,
        })
    }

    /// Writes a program, then `control`, which is a number so that one that isn't any can be tried.
    pub fn control_generator(&self, control: u32, program: &Program) -> Result<()> {
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_IOVA, Width::Quad, program.iova)?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_LENGTH, Width::Quad, program.length)?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_SEED, Width::Quad, program.seed)?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_LIMIT, Width::Quad, program.limit)?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_RATE, Width::Long, program.rate.into())?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_MODE, Width::Long, program.mode.into())?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_CONTROL, Width::Long, control.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn program(seed: u64, pages: u64) -> Program {
        Program { iova: 0x10_0000, length: pages * PAGE, seed, limit: 0, rate: 0, mode: 7 }
    }

    #[test]
    fn writes_are_what_the_header_says() {
        // Computed from the header's text by other means than this code.
        for (seed, pages, n, page, its_seed, way) in [
            (0, 1, 0, 0, 0xe220_a839_7b1d_cdaf, 1),
            (1, 7, 0, 6, 0x910a_2dec_8902_5cc1, 1),
            (1, 7, 6, 1, 0xe099_ec6c_d736_3ca5, 1),
            (1, 7, 7, 6, 0x85e7_bb0f_1227_8575, 2),
            (0xdead_beef, 1000, 123_456, 730, 0x5080_78d9_6273_b4df, 1),
            (u64::MAX, (1 << 31) - 1, (1 << 31) - 2, 1_043_656_645, 0xbc73_4d88_78ac_3686, 1),
        ] {
            let program = program(seed, pages);
            assert_eq!(program.page(n), program.iova + page * PAGE, "page of write {n}");
            assert_eq!(program.seed(n), its_seed, "seed of write {n}");
            assert_eq!(program.way(n), way, "way of write {n}");
        }
    }

    #[test]
    fn contents_follow_from_the_counter() {
        for pages in [1, 2, 3, 64, 1000] {
            let program = program(42, pages);
            let mut memory = HashMap::new();
            for n in 0..3 * pages {
                assert!(program.contents(n).collect::<HashMap<_, _>>() == memory, "{n} writes");
                assert!(program.contents(n).count() == memory.len(), "a page twice, {n} writes");
                memory.insert(program.page(n), program.seed(n));
            }
            assert_eq!(memory.len() as u64, pages);
        }
    }

    #[test]
    fn a_page_is_written_in_every_way() {
        let program = Program { mode: 0b101, ..program(1, 8) };
        let ways: Vec<_> = (0..2).map(|round| program.way(8 * round)).collect();
        assert_eq!(ways, [1, 4]);
    }
}
