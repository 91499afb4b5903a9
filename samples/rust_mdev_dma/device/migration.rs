// SPDX-License-Identifier: GPL-2.0

//! Migration data: see the uapi header for its format.

use super::{
    command::{Command, Limits},
    config_space::{self, ConfigSpace},
    generator, pattern,
    registers::{self, Registers},
    Inner, MdevDma,
};
use crate::{
    abstractions::vfio::{LoadError, OpenDevice, Pins, RawRange, PAGE_PINS},
    bindings::{
        rust_mdev_dma_mig_section_RUST_MDEV_DMA_MIG_DEVICE as DEVICE,
        rust_mdev_dma_mig_section_RUST_MDEV_DMA_MIG_IDENTITY as IDENTITY,
        rust_mdev_dma_mig_section_RUST_MDEV_DMA_MIG_RAW_PINS as RAW_PINS,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_RAW_PIN as RAW_PIN, RUST_MDEV_DMA_MIG_MAGIC as MAGIC,
        RUST_MDEV_DMA_MIG_VERSION, RUST_MDEV_DMA_PCI_DEVICE_ID, RUST_MDEV_DMA_PCI_VENDOR_ID,
    },
};
use core::ops::Range;
use kernel::{page::PAGE_SIZE, prelude::*};

/// Size of a section's header, and the offset of the checksum at its end.
const HEADER: usize = 32;
const CHECKSUM: usize = HEADER - size_of::<u64>();
const LENGTH: usize = CHECKSUM - size_of::<u64>();

const PAGE: u64 = PAGE_SIZE as u64;

/// Size of a run of pinned pages, and of a raw pin.
const RUN: usize = 16;

/// Size of the DEVICE section without header and runs.
const FIXED: usize = config_space::SIZE + registers::FILE_SIZE + 14 * size_of::<u64>();

/// Size of the IDENTITY section.
const IDENTITY_SIZE: usize = HEADER + 2 * size_of::<u64>();

/// Size of the data of a device with `runs` runs of pinned pages, and `raw` raw pins.
pub(super) fn size(runs: usize, raw: usize) -> usize {
    const LEAST: usize = IDENTITY_SIZE + HEADER + FIXED;

    let raw_header = if raw > 0 { HEADER } else { 0 };
    LEAST
        .saturating_add(raw_header)
        .saturating_add(runs.saturating_add(raw).saturating_mul(RUN))
}

/// Reads the data, or a section's contents, from the front. All methods fail with `EINVAL` at its
/// end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(EINVAL)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool> {
        match self.u64()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(EINVAL),
        }
    }

    fn end(self) -> Result {
        self.0.is_empty().then_some(()).ok_or(EINVAL)
    }

    /// The contents of the next section. Fails with `EINVAL` if it isn't a valid section of `kind`.
    fn section(&mut self, kind: u32) -> Result<Self> {
        let header: [u8; HEADER] = self.array()?;
        let mut fields = Reader(&header);
        let magic = fields.u64()?;
        let (version, found) = (fields.u32()?, fields.u32()?);
        let (length, checksum) = (fields.u64()?, fields.u64()?);
        if magic != MAGIC || version != RUST_MDEV_DMA_MIG_VERSION || found != kind {
            return Err(EINVAL);
        }
        let contents = self.take(usize::try_from(length)?)?;
        if checksum != pattern::checksum(&[&header[..CHECKSUM], contents]) {
            return Err(EINVAL);
        }
        Ok(Reader(contents))
    }
}

/// A section that is appended to `stream`.
struct Section<'a> {
    stream: &'a mut KVVec<u8>,
    start: usize,
}

impl<'a> Section<'a> {
    fn begin(stream: &'a mut KVVec<u8>, kind: u32) -> Result<Self> {
        let start = stream.len();
        let mut this = Self { stream, start };
        this.u64(MAGIC)?;
        this.u64(u64::from(RUST_MDEV_DMA_MIG_VERSION) | u64::from(kind) << 32)?;
        // Length and checksum: `end()` sets them.
        this.u64(0)?;
        this.u64(0)?;
        Ok(this)
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result {
        Ok(self.stream.extend_from_slice(bytes, GFP_KERNEL_ACCOUNT)?)
    }

    fn u64(&mut self, value: u64) -> Result {
        self.bytes(&value.to_le_bytes())
    }

    #[expect(
        clippy::indexing_slicing,
        reason = "a section begins with a whole header, by `Self::begin`"
    )]
    fn end(self) {
        let section = &mut self.stream[self.start..];
        let length = section.len().saturating_sub(HEADER) as u64;
        section[LENGTH..CHECKSUM].copy_from_slice(&length.to_le_bytes());
        let checksum = pattern::checksum(&[&section[..CHECKSUM], &section[HEADER..]]);
        section[CHECKSUM..HEADER].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// The contents of the IDENTITY section, which must be the same at source and destination.
fn identity() -> [u64; 2] {
    let ids = RUST_MDEV_DMA_PCI_VENDOR_ID | RUST_MDEV_DMA_PCI_DEVICE_ID << 16;
    [u64::from(ids), PAGE_SIZE as u64]
}

/// Appends the IDENTITY section.
pub(super) fn save_identity(stream: &mut KVVec<u8>) -> Result {
    let mut section = Section::begin(stream, IDENTITY)?;
    for value in identity() {
        section.u64(value)?;
    }
    section.end();
    Ok(())
}

/// Appends the DEVICE section of a quiesced device, and the RAW_PINS section if it has raw pins.
pub(super) fn save(inner: &mut Inner, dev: &OpenDevice<MdevDma>, stream: &mut KVVec<u8>) -> Result {
    let pins = dev.pins();
    inner.registers.set_pins(pins.held());
    let mut section = Section::begin(stream, DEVICE)?;
    section.bytes(inner.config_space.as_bytes())?;
    section.bytes(inner.registers.as_bytes())?;

    let command = inner.queued.as_ref();
    section.u64(command.is_some().into())?;
    let Command {
        op,
        iova,
        length,
        seed,
    } = command.copied().unwrap_or_default();
    for value in [op.into(), iova, length, seed] {
        section.u64(value)?;
    }

    let params = inner.generator.params();
    section.u64(params.is_some().into())?;
    let params = params.copied().unwrap_or_default();
    let status = inner.generator.status();
    for value in [
        params.iova,
        params.length,
        params.seed,
        params.limit,
        u64::from(params.rate) | u64::from(params.mode) << 32,
        inner.generator.counter(),
        status.into(),
    ] {
        section.u64(value)?;
    }

    section.u64(pins.runs().count() as u64)?;
    for (range, count) in pins.runs() {
        let pages = range.end.saturating_sub(range.start) / PAGE;
        section.u64(range.start)?;
        section.u64(pages | u64::from(count) << 32)?;
    }
    section.end();

    if pins.raw().next().is_some() {
        let mut section = Section::begin(stream, RAW_PINS)?;
        for raw in pins.raw() {
            section.u64(raw.iova)?;
            section.u64(u64::from(raw.pages) | u64::from(raw.protection) << 32)?;
        }
        section.end();
    }
    Ok(())
}

/// A device restored from migration data. All of the data has been checked, but not whether the
/// pages can be pinned.
pub(super) struct Saved<'a> {
    config_space: ConfigSpace,
    registers: Registers,
    queued: Option<Command>,
    params: Option<generator::Params>,
    counter: u64,
    status: u32,
    runs: Reader<'a>,
    /// Raw pins.
    raw: Reader<'a>,
}

impl<'a> Saved<'a> {
    /// Parses complete migration data. Fails with `EINVAL`, as START does, or with `EOPNOTSUPP` if
    /// there are raw pins in it and not in this device.
    pub(super) fn new(stream: &'a [u8], limits: Limits) -> Result<Self> {
        let mut stream = Reader(stream);
        let mut section = stream.section(IDENTITY)?;
        for value in identity() {
            if section.u64()? != value {
                return Err(EINVAL);
            }
        }
        section.end()?;

        let mut section = stream.section(DEVICE)?;
        let mut raw = Reader(&[]);
        if !stream.0.is_empty() {
            raw = stream.section(RAW_PINS)?;
            if raw.0.is_empty() || raw.0.len() % RUN != 0 {
                return Err(EINVAL);
            }
            if !limits.offers(RAW_PIN) {
                return Err(EOPNOTSUPP);
            }
        }
        stream.end()?;
        let config_space = ConfigSpace::from_bytes(&section.array()?);
        let registers = section.array()?;
        let queued = section.flag()?;
        let command = Command {
            op: section.u64()?.try_into()?,
            iova: section.u64()?,
            length: section.u64()?,
            seed: section.u64()?,
        };
        let queued = queued.then_some(command);

        let running = section.flag()?;
        let params = generator::Params {
            iova: section.u64()?,
            length: section.u64()?,
            seed: section.u64()?,
            limit: section.u64()?,
            rate: section.u32()?,
            mode: section.u32()?,
        };
        let params = running.then_some(params);
        if let Some(params) = &params {
            params.check(limits)?;
        }
        let (counter, status) = (section.u64()?, section.u64()?.try_into()?);

        let runs = section.u64()?;
        if usize::try_from(runs)?.checked_mul(RUN) != Some(section.0.len()) {
            return Err(EINVAL);
        }
        let saved = Self {
            config_space,
            registers: Registers::from_bytes(&registers, limits, queued.is_some())?,
            queued,
            params,
            counter,
            status,
            runs: section,
            raw,
        };
        for run in saved.runs() {
            run?;
        }
        for raw in saved.raw() {
            if raw?.pages == 0 {
                return Err(EINVAL);
            }
        }
        Ok(saved)
    }

    /// The runs of pinned pages, and the number of pins of each page.
    fn runs(&self) -> impl Iterator<Item = Result<(Range<u64>, u32)>> + '_ {
        self.runs.0.chunks(RUN).map(|run| {
            let mut run = Reader(run);
            let (iova, pages, count) = (run.u64()?, run.u32()?, run.u32()?);
            // 32 and 12 bits.
            let length = u64::from(pages).wrapping_mul(PAGE);
            let end = iova.checked_add(length).ok_or(EINVAL)?;
            let valid =
                iova % PAGE == 0 && length != 0 && (1..=u32::from(PAGE_PINS)).contains(&count);
            valid.then_some((iova..end, count)).ok_or(EINVAL)
        })
    }

    /// The raw pins.
    fn raw(&self) -> impl Iterator<Item = Result<RawRange>> + '_ {
        self.raw.0.chunks(RUN).map(|raw| {
            let mut raw = Reader(raw);
            Ok(RawRange {
                iova: raw.u64()?,
                pages: raw.u32()?,
                protection: raw.u32()?,
            })
        })
    }

    /// Pins the pages and replaces `inner`. The device is quiesced and has no pins. If this fails,
    /// `inner` is unchanged and there are no pins.
    pub(super) fn restore(
        self,
        inner: &mut Inner,
        dev: &OpenDevice<MdevDma>,
    ) -> Result<(), LoadError> {
        let mut pins = dev.pins();
        if let Err(e) = self.pin(&mut pins, inner.limits) {
            pins.unpin_all();
            return Err(e);
        }
        drop(pins);
        if let Some((engine, command)) = inner.engine.as_ref().zip(self.queued.as_ref()) {
            if let Err(e) = engine.reserve(dev, command) {
                dev.pins().unpin_all();
                return Err(LoadError::Refused(e));
            }
        }

        inner.config_space = self.config_space;
        inner.registers = self.registers;
        inner.queued = self.queued;
        inner
            .generator
            .restore(self.params, self.counter, self.status);
        inner.show_generator();
        Ok(())
    }

    /// Pins the pages. Some of them may be pinned if this fails.
    fn pin(&self, pins: &mut Pins<'_, MdevDma>, limits: Limits) -> Result<(), LoadError> {
        let room = |pins: &Pins<'_, MdevDma>, pages: u64| {
            let left = limits.pins.saturating_sub(pins.held());
            (pages <= left)
                .then_some(())
                .ok_or(LoadError::Invalid(ENOSPC))
        };
        for run in self.runs() {
            let (range, count) = run.map_err(LoadError::Invalid)?;
            for _ in 0..count {
                room(pins, range.end.saturating_sub(range.start) / PAGE)?;
                pins.pin_killable(range.clone())
                    .map_err(LoadError::Refused)?;
            }
        }
        for raw in self.raw() {
            let raw = raw.map_err(LoadError::Invalid)?;
            room(pins, raw.pages.into())?;
            pins.raw_pin(raw).map_err(LoadError::Refused)?;
        }
        Ok(())
    }
}

#[cfg(kunit_suites)]
#[kernel::macros::kunit_tests(rust_mdev_dma_migration)]
mod tests {
    use super::*;

    const KIND: u32 = 5;

    fn limits() -> Limits {
        Limits {
            ops: u32::MAX,
            pins: 1 << 16,
            length: 1 << 20,
        }
    }

    /// A section with these contents.
    fn section(stream: &mut KVVec<u8>, kind: u32, contents: &[u64]) -> Result {
        let mut section = Section::begin(stream, kind)?;
        for &value in contents {
            section.u64(value)?;
        }
        section.end();
        Ok(())
    }

    /// The data of a device with nothing in progress, and these runs of pins and raw pins.
    fn data(runs: &[[u64; 2]], raw: &[[u64; 2]]) -> Result<KVVec<u8>> {
        let mut stream = KVVec::new();
        save_identity(&mut stream)?;
        let mut device = Section::begin(&mut stream, DEVICE)?;
        device.bytes(&[0; config_space::SIZE])?;
        device.bytes(&[0; registers::FILE_SIZE])?;
        // No command, no generator.
        for _ in 0..13 {
            device.u64(0)?;
        }
        device.u64(runs.len() as u64)?;
        for &value in runs.as_flattened() {
            device.u64(value)?;
        }
        device.end();
        if !raw.is_empty() {
            section(&mut stream, RAW_PINS, raw.as_flattened())?;
        }
        Ok(stream)
    }

    fn refused(stream: &[u8]) -> Option<Error> {
        Saved::new(stream, limits()).err()
    }

    #[test]
    fn a_reader_stops_at_the_end() -> Result {
        let bytes = [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9];
        let mut reader = Reader(&bytes);
        assert_eq!(reader.u32(), Ok(1));
        assert_eq!(reader.u64(), Ok(2));
        assert_eq!(reader.u32(), Err(EINVAL));
        assert_eq!(reader.take(1)?, [9]);
        assert_eq!(reader.take(1), Err(EINVAL));
        assert_eq!(reader.end(), Ok(()));
        assert_eq!(Reader(&bytes).end(), Err(EINVAL));
        Ok(())
    }

    #[test]
    fn a_flag_is_0_or_1() {
        let flag = |value: u64| Reader(&value.to_le_bytes()).flag();
        assert_eq!(flag(0), Ok(false));
        assert_eq!(flag(1), Ok(true));
        assert_eq!(flag(2), Err(EINVAL));
        assert_eq!(flag(1 << 32), Err(EINVAL));
    }

    #[test]
    fn sections_are_read_as_written() -> Result {
        let mut stream = KVVec::new();
        section(&mut stream, KIND, &[3, 4])?;
        section(&mut stream, KIND + 1, &[])?;
        let mut reader = Reader(&stream);
        assert!(Reader(&stream).section(KIND + 1).is_err());
        let mut contents = reader.section(KIND)?;
        assert_eq!((contents.u64()?, contents.u64()?), (3, 4));
        contents.end()?;
        reader.section(KIND + 1)?.end()?;
        reader.end()
    }

    #[test]
    fn any_modified_byte_is_noticed() -> Result {
        let mut stream = KVVec::new();
        section(&mut stream, KIND, &[3, 4])?;
        for i in 0..stream.len() {
            stream[i] ^= 0x10;
            assert!(Reader(&stream).section(KIND).is_err());
            stream[i] ^= 0x10;
            assert!(Reader(&stream[..i]).section(KIND).is_err());
        }
        assert!(Reader(&stream).section(KIND).is_ok());
        Ok(())
    }

    #[test]
    fn a_size_that_is_no_size_is_refused() -> Result {
        let mut stream = KVVec::new();
        section(&mut stream, KIND, &[])?;
        stream[LENGTH..CHECKSUM].fill(0xff);
        let sum = pattern::checksum(&[&stream[..CHECKSUM]]);
        stream[CHECKSUM..HEADER].copy_from_slice(&sum.to_le_bytes());
        assert!(Reader(&stream).section(KIND).is_err());
        Ok(())
    }

    #[test]
    fn data_has_the_size_that_is_told() -> Result {
        let (run, raw) = ([0, 1 | 1 << 32], [5, 1 | 1 << 32]);
        assert_eq!(data(&[], &[])?.len(), size(0, 0));
        assert_eq!(data(&[run; 3], &[])?.len(), size(3, 0));
        assert_eq!(data(&[run], &[raw; 2])?.len(), size(1, 2));
        assert_eq!(size(usize::MAX, 1), usize::MAX);
        Ok(())
    }

    #[test]
    fn pins_are_read_as_written() -> Result {
        let stream = data(&[[PAGE, 2 | 3 << 32]], &[[5, 7 | 1 << 32]])?;
        let saved = Saved::new(&stream, limits())?;
        let mut runs = saved.runs();
        assert_eq!(runs.next(), Some(Ok((PAGE..3 * PAGE, 3))));
        assert!(runs.next().is_none());
        let raw = saved.raw().next().ok_or(EINVAL)??;
        assert_eq!((raw.iova, raw.pages, raw.protection), (5, 7, 1));
        Ok(())
    }

    #[test]
    fn what_cannot_be_is_refused() -> Result {
        const ONCE: u64 = 1 << 32;

        assert_eq!(refused(&data(&[], &[])?), None);
        let last = 0u64.wrapping_sub(PAGE);
        for run in [
            [1, 1 | ONCE],
            [0, ONCE],
            [0, 1],
            [0, 1 | 0x1_0000 << 32],
            [last, 2 | ONCE],
        ] {
            assert_eq!(refused(&data(&[run], &[])?), Some(EINVAL));
        }
        let mut stream = data(&[], &[])?;
        stream.push(0, GFP_KERNEL)?;
        assert!(refused(&stream).is_some());
        stream.truncate(stream.len() - 2);
        assert!(refused(&stream).is_some());

        let without = Limits { ops: 0, ..limits() };
        let raw = data(&[], &[[0, 1]])?;
        assert_eq!(Saved::new(&raw, without).err(), Some(EOPNOTSUPP));
        Ok(())
    }
}
