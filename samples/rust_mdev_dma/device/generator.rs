// SPDX-License-Identifier: GPL-2.0

//! The generator, which writes pages by itself: see the uapi header for their order and contents.

pub(super) use super::registers::GeneratorParams as Params;
use super::{
    command::Limits,
    engine::write_pinned,
    pattern::{mix, Block, STEP, WORD},
    MdevDma,
};
use crate::{
    abstractions::vfio::OpenDevice,
    bindings::{
        rust_mdev_dma_gen_control_RUST_MDEV_DMA_GEN_CONTINUE as CONTINUE,
        rust_mdev_dma_gen_control_RUST_MDEV_DMA_GEN_START as START,
        rust_mdev_dma_gen_control_RUST_MDEV_DMA_GEN_STOP as STOP, RUST_MDEV_DMA_GEN_DMA_RW,
        RUST_MDEV_DMA_GEN_PIN, RUST_MDEV_DMA_GEN_PINNED, RUST_MDEV_DMA_GEN_STRIDE,
    },
};
use core::{num::NonZero, ops::Range};
use kernel::{
    page::PAGE_SIZE,
    prelude::*,
    time::{msecs_to_jiffies, Instant, Jiffies, Monotonic, NSEC_PER_SEC},
};

const STRIDE: u64 = RUST_MDEV_DMA_GEN_STRIDE as u64;

const PAGE: u64 = PAGE_SIZE as u64;

const SECOND: u64 = NSEC_PER_SEC as u64;

/// A range has fewer pages than this.
const MAX_PAGES: u64 = 1 << 31;

/// Maximum number of pages to write while holding `MdevDma::inner`.
const SLICE: u64 = 64;

impl Params {
    /// Checks the parameters. Fails as START does, see the uapi header.
    pub(super) fn check(&self, limits: Limits) -> Result {
        const MODES: u32 =
            RUST_MDEV_DMA_GEN_PINNED | RUST_MDEV_DMA_GEN_DMA_RW | RUST_MDEV_DMA_GEN_PIN;

        let whole = self.length != 0 && self.iova % PAGE == 0 && self.length % PAGE == 0;
        if !whole || self.mode == 0 || self.mode & !MODES != 0 {
            return Err(EINVAL);
        }
        self.iova.checked_add(self.length).ok_or(EOVERFLOW)?;
        if self.length > limits.length || self.pages().get() >= MAX_PAGES {
            return Err(E2BIG);
        }
        Ok(())
    }

    /// Number of pages: parameters that were checked have some.
    fn pages(&self) -> NonZero<u64> {
        NonZero::new(self.length / PAGE).unwrap_or(NonZero::<u64>::MIN)
    }

    /// Whether GEN_LIMIT is reached after `counter` writes.
    fn reached(&self, counter: u64) -> bool {
        self.limit != 0 && counter >= self.limit
    }

    /// The range of write `n`: one page.
    fn page(&self, n: u64) -> Range<u64> {
        let pages = self.pages();
        // Nothing of this wraps, as `check()` has seen to it: there are less than `MAX_PAGES`.
        let page = (n % pages).wrapping_mul(STRIDE);
        let page = page.wrapping_add(mix(self.seed) % pages) % pages;
        let iova = self.iova.wrapping_add(page.wrapping_mul(PAGE));
        iova..iova.wrapping_add(PAGE)
    }

    /// The seed of write `n`.
    fn seed(&self, n: u64) -> u64 {
        mix(self.seed.wrapping_add(n.wrapping_add(1).wrapping_mul(STEP)))
    }

    /// The method of write `n`: one of the bits of the mode.
    fn method(&self, n: u64) -> u32 {
        let methods =
            NonZero::new(u64::from(self.mode.count_ones())).unwrap_or(NonZero::<u64>::MIN);
        let pages = self.pages();
        let mut mode = self.mode;
        for _ in 0..(n % pages).wrapping_add(n / pages) % methods {
            mode &= mode.wrapping_sub(1);
        }
        mode & mode.wrapping_neg()
    }
}

/// Paces the generator to GEN_RATE.
struct Pace {
    since: Instant<Monotonic>,
    written: u64,
}

impl Pace {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            written: 0,
        }
    }

    /// The number of pages that are due now.
    fn due(&mut self, rate: u32) -> u64 {
        if rate == 0 {
            return SLICE;
        }
        // Starts over after a second: what is still due then is dropped, and nothing overflows.
        let elapsed = self.since.elapsed().as_nanos().clamp(0, 2 * NSEC_PER_SEC) as u64;
        let due = elapsed.saturating_mul(rate.into()) / SECOND;
        let due = due.saturating_sub(self.written);
        if elapsed >= SECOND {
            *self = Self::new();
        }
        due
    }

    /// The delay before the next page is due, when none is.
    fn interval(rate: u32) -> Jiffies {
        msecs_to_jiffies(1000u32.checked_div(rate).unwrap_or(0)).max(1)
    }
}

/// The generator, running or not.
pub(super) struct Generator {
    /// Its parameters; `None` while it is stopped.
    params: Option<Params>,
    pace: Pace,
    counter: u64,
    /// Why it is stopped: 0 or an errno.
    status: u32,
    /// The contents of one page, for `vfio_dma_rw()` to copy from.
    buffer: KVVec<u64>,
}

impl Generator {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            params: None,
            pace: Pace::new(),
            counter: 0,
            status: 0,
            buffer: KVVec::from_elem(0, PAGE_SIZE / WORD, GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// Stops the generator and sets GEN_COUNTER to 0.
    pub(super) fn reset(&mut self) {
        self.stop(Ok(()));
        self.counter = 0;
    }

    /// The parameters, or `None` if it is stopped.
    pub(super) fn params(&self) -> Option<&Params> {
        self.params.as_ref()
    }

    pub(super) fn counter(&self) -> u64 {
        self.counter
    }

    pub(super) fn status(&self) -> u32 {
        self.status
    }

    /// Restores the generator from migration data.
    pub(super) fn restore(&mut self, params: Option<Params>, counter: u64, status: u32) {
        self.params = params;
        self.counter = counter;
        self.status = status;
    }

    /// A write to GEN_CONTROL.
    pub(super) fn control(&mut self, control: u32, params: Params, limits: Limits) {
        self.stop(Ok(()));
        match control {
            STOP => (),
            START | CONTINUE => match params.check(limits) {
                Ok(()) => {
                    if control == START {
                        self.counter = 0;
                    }
                    self.params = Some(params);
                    self.start_pace();
                }
                Err(e) => self.stop(Err(e)),
            },
            _ => self.stop(Err(EOPNOTSUPP)),
        }
    }

    /// Restarts pacing, when the generator or the device starts to run.
    pub(super) fn start_pace(&mut self) {
        self.pace = Pace::new();
    }

    fn stop(&mut self, why: Result) {
        self.params = None;
        self.status = why.map_or_else(|e| e.to_errno().unsigned_abs(), |()| 0);
    }

    /// Writes the pages that are due, at most a slice. Returns the delay until the next call, or
    /// `None` if the generator has stopped.
    pub(super) fn run(
        &mut self,
        dev: &OpenDevice<MdevDma>,
        limits: Limits,
        awaited: &impl Fn() -> bool,
    ) -> Option<Jiffies> {
        let params = self.params?;
        let due = self.pace.due(params.rate);
        for _ in 0..due.min(SLICE) {
            if params.reached(self.counter) || dev.interrupted() || awaited() {
                break;
            }
            if let Err(e) = self.write(dev, &params, limits) {
                // A write that was ended for who waits isn't counted, and is made later.
                if dev.interrupted() {
                    break;
                }
                self.stop(Err(e));
                return None;
            }
            // The user and migration data may set it to any value, from which it counts on.
            self.counter = self.counter.wrapping_add(1);
            self.pace.written = self.pace.written.wrapping_add(1);
        }
        if params.reached(self.counter) {
            self.stop(Ok(()));
            return None;
        }
        Some(match due {
            0 => Pace::interval(params.rate),
            _ => 0,
        })
    }

    /// Writes the next page.
    fn write(&mut self, dev: &OpenDevice<MdevDma>, params: &Params, limits: Limits) -> Result {
        let page = params.page(self.counter);
        let seed = params.seed(self.counter);
        match params.method(self.counter) {
            RUST_MDEV_DMA_GEN_PINNED => write_pinned(&dev.pins(), page, seed),
            RUST_MDEV_DMA_GEN_PIN => {
                let mut pins = dev.pins();
                if pins.held() >= limits.pins {
                    return Err(ENOSPC);
                }
                pins.pin(page.clone())?;
                write_pinned(&pins, page.clone(), seed)?;
                pins.unpin(page)
            }
            _ => {
                let words = 0..self.buffer.len();
                Block::of(seed, page.start).fill(&mut self.buffer, words);
                dev.dma_write(page.start, self.buffer.as_bytes())
            }
        }
    }
}

#[cfg(kunit_suites)]
#[kunit_tests(rust_mdev_dma_generator)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        ops: 0,
        pins: 0,
        length: 1 << 30,
    };

    fn params(pages: u64, mode: u32) -> Params {
        Params {
            iova: 16 * PAGE,
            length: pages * PAGE,
            seed: 5,
            limit: 0,
            rate: 0,
            mode,
        }
    }

    #[test]
    fn as_many_writes_as_pages_write_each_once() -> Result {
        for pages in [1, 2, 3, 64, 100] {
            let params = params(pages, 1);
            for first in [0, 1, 77] {
                let mut seen = KVec::from_elem(false, pages as usize, GFP_KERNEL)?;
                for n in first..first + pages {
                    let page = params.page(n);
                    assert_eq!(page.end - page.start, PAGE);
                    seen[((page.start - params.iova) / PAGE) as usize] = true;
                }
                assert!(!seen.contains(&false));
            }
        }
        Ok(())
    }

    #[test]
    fn methods_take_turns_on_each_page() {
        let params = params(4, RUST_MDEV_DMA_GEN_PINNED | RUST_MDEV_DMA_GEN_PIN);
        for n in 0..8 {
            let method = params.method(n);
            assert!(method.count_ones() == 1 && params.mode & method != 0);
            assert!(method != params.method(n + 1) || n % 4 == 3);
            // The next write of the same page.
            assert!(method != params.method(n + 4));
        }
        assert_eq!(params.method(0), RUST_MDEV_DMA_GEN_PINNED);
    }

    #[test]
    fn seeds_differ() {
        let params = params(1, 1);
        assert_eq!(params.seed(0), mix(5u64.wrapping_add(STEP)));
        assert!(params.seed(0) != params.seed(1));
    }

    #[test]
    fn errors_of_start() {
        assert_eq!(params(1, 7).check(LIMITS), Ok(()));
        assert_eq!(params(0, 1).check(LIMITS), Err(EINVAL));
        assert_eq!(params(1, 0).check(LIMITS), Err(EINVAL));
        assert_eq!(params(1, 8).check(LIMITS), Err(EINVAL));
        let odd = Params {
            iova: 1,
            ..params(1, 1)
        };
        assert_eq!(odd.check(LIMITS), Err(EINVAL));
        let last = Params {
            iova: 0u64.wrapping_sub(PAGE),
            ..params(2, 1)
        };
        assert_eq!(last.check(LIMITS), Err(EOVERFLOW));
        let long = (1 << 30) / PAGE;
        assert_eq!(params(long, 1).check(LIMITS), Ok(()));
        assert_eq!(params(long + 1, 1).check(LIMITS), Err(E2BIG));
        let all = Limits {
            length: u64::MAX,
            ..LIMITS
        };
        assert_eq!(params(MAX_PAGES, 1).check(all), Err(E2BIG));
    }

    #[test]
    fn a_limit_is_reached() {
        let limited = Params {
            limit: 3,
            ..params(1, 1)
        };
        assert!(!limited.reached(2) && limited.reached(3) && limited.reached(4));
        assert!(!params(1, 1).reached(u64::MAX));
    }

    #[test]
    fn control() -> Result {
        let mut generator = Generator::new()?;
        generator.control(START, params(0, 1), LIMITS);
        assert!(generator.params().is_none());
        assert_eq!(generator.status(), EINVAL.to_errno().unsigned_abs());
        generator.counter = 9;
        generator.control(CONTINUE, params(1, 1), LIMITS);
        assert!(generator.params().is_some() && generator.status() == 0);
        assert_eq!(generator.counter(), 9);
        generator.control(START, params(1, 1), LIMITS);
        assert_eq!(generator.counter(), 0);
        generator.control(99, params(1, 1), LIMITS);
        assert!(generator.params().is_none());
        assert_eq!(generator.status(), EOPNOTSUPP.to_errno().unsigned_abs());
        generator.control(STOP, params(1, 1), LIMITS);
        assert_eq!(generator.status(), 0);
        Ok(())
    }
}
