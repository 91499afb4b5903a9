// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    Answer, Buffer, BufferMemory, Op, PAGE,
    regions::BORDER,
    slots::{self, SlotKind},
};
use anyhow::{Context as _, Result, bail};
use dirty_model::{Bitmap, Errno};
use edu_client::Edu;
use harness::Failure;
use mdev_dma::{MdevDma, Outcome, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use vfio_client::{
    Access, BitmapArgs, Container, DeviceNode, Error, Group, Leave, MapArgs, Memory, UnmapArgs,
    fail_nth::{Workers, counted, with_failure},
};

/// A command that takes longer is stuck.
const LONG: Duration = Duration::from_secs(20);

/// The kernel's side: a container, and slots for devices that may be open in it.
pub struct LiveContainer {
    // Devices are closed before the container.
    open: BTreeMap<usize, OpenDevice>,
    /// Those whose groups are in the container.
    nodes: BTreeMap<usize, DeviceNode>,
    pub container: Arc<Container>,
}

enum OpenDevice {
    Commands(MdevDma),
    Edu(Edu),
}

impl LiveContainer {
    /// A container with the group of these devices, by their slots, which aren't open yet.
    pub fn new(devices: Vec<(usize, DeviceNode)>) -> Result<Self> {
        let container = Container::new(group_of(&devices)?)?;
        Ok(Self { open: BTreeMap::new(), nodes: devices.into_iter().collect(), container })
    }

    /// Puts the group of these devices, by their slots, into the container.
    pub fn join(&mut self, devices: Vec<(usize, DeviceNode)>) -> Result<Answer> {
        let joined = status(self.container.attach(group_of(&devices)?))?;
        if joined.is_ok() {
            self.nodes.extend(devices);
        }
        Ok(Answer::of(joined))
    }

    fn leave(&mut self, slot: usize, by: Leave) -> Result<Answer> {
        let group = self.nodes[&slot].group();
        let left = status(self.container.detach(group, by))?;
        if left.is_ok() {
            self.has_left(slot);
        }
        Ok(Answer::of(left))
    }

    /// The group of a device isn't in the container any more.
    pub fn has_left(&mut self, slot: usize) {
        let group = self.nodes[&slot].group();
        self.nodes.retain(|_, node| node.group() != group);
    }

    /// The group of the device in a slot, if it is in the container.
    pub fn group(&self, slot: usize) -> Option<u32> {
        self.nodes.get(&slot).map(DeviceNode::group)
    }

    /// The device that is open in a slot, which runs commands.
    pub fn device(&self, slot: usize) -> &MdevDma {
        match self.open.get(&slot) {
            Some(OpenDevice::Commands(device)) => device,
            _ => panic!("no device that runs commands is open in slot {slot}"),
        }
    }

    /// The slots with open devices that run commands.
    pub fn open_devices(&self) -> impl Iterator<Item = (usize, &MdevDma)> {
        self.open.iter().filter_map(|(&slot, open)| match open {
            OpenDevice::Commands(device) => Some((slot, device)),
            OpenDevice::Edu(_) => None,
        })
    }

    /// The edu that is open in a slot.
    pub fn edu(&self, slot: usize) -> &Edu {
        match self.open.get(&slot) {
            Some(OpenDevice::Edu(edu)) => edu,
            _ => panic!("no edu is open in slot {slot}"),
        }
    }

    fn open(&mut self, slot: usize) -> Result<Answer> {
        let node = &self.nodes[&slot];
        let open = match slots::kind(slot) {
            Some(SlotKind::Edu) => OpenDevice::Edu(Edu::open(&self.container, node)?),
            _ => OpenDevice::Commands(MdevDma::open(&self.container, node)?),
        };
        self.open.insert(slot, open);
        Ok(Answer::of(Ok(())))
    }

    /// Does `op`. Fails only if there is no answer to speak of.
    pub fn apply(&mut self, op: &Op) -> Result<Answer> {
        match *op {
            Op::Map { .. } => bail!("needs memory: see LiveContainer::map"),
            Op::Join { .. } => bail!("needs devices: see LiveContainer::join"),
            Op::Leave { device, by } => self.leave(device, by),
            Op::Unmap { iova, size, flags } => {
                self.unmap(&UnmapArgs { iova, size, flags, argsz: None })
            }
            Op::UnmapBitmap { iova, size, buffer } => self.unmap_bitmap(iova, size, &buffer),
            Op::Start => status(self.container.dirty_start()).map(Answer::of),
            Op::Stop => status(self.container.dirty_stop()).map(Answer::of),
            Op::DirtyPages { flags } => status(self.container.dirty(flags, None)).map(Answer::of),
            Op::GetBitmap { iova, size, buffer } => self.get_bitmap(iova, size, &buffer),
            // The process's own business.
            Op::Hide { .. }
            | Op::Show { .. }
            | Op::UserWrite { .. }
            | Op::Limit { .. }
            | Op::Check => Ok(Answer::of(Ok(()))),
            Op::Open { device } => self.open(device),
            Op::Close { device } => {
                counted(|| drop(self.open.remove(&device)));
                Ok(Answer::of(Ok(())))
            }
            Op::Copy { device, from, to, length } => {
                self.edu(device).copy(from, to, length)?;
                Ok(Answer::of(Ok(())))
            }
            Op::Reset { device } => status(self.device(device).device().reset()).map(Answer::of),
            Op::Command { device, op, iova, length, seed } => {
                let mut outcome = self.device(device).run(op, iova, length, seed)?;
                if op & BACKGROUND != 0 {
                    outcome = self.device(device).wait(LONG)?;
                }
                Ok(of_command(&outcome))
            }
        }
    }

    /// Does `op`, a command, whose `n`th allocation fails where it is run: in the write to COMMAND, or by a
    /// worker of the kernel. Says whether there were so many.
    pub fn command_with_failure(&self, op: &Op, n: u32) -> Result<(Answer, bool)> {
        let Op::Command { device, op, iova, length, seed } = *op else { bail!("no command: {op}") };
        let device = self.device(device);
        device.prepare(iova, length, seed)?;
        if op & BACKGROUND != 0 {
            let workers = Workers::arm(n)?;
            device.write_command(op)?;
            let outcome = device.wait(LONG)?;
            return Ok((of_command(&outcome), workers.disarm()));
        }
        let (rung, used) = with_failure(n, || device.write_command(op))?;
        match rung {
            Ok(()) => Ok((of_command(&device.outcome()?), used)),
            // It wasn't run.
            Err(error) if error.errno() != 0 => Ok((Answer::of(Err(Errno(error.errno()))), used)),
            Err(error) => Err(error.into()),
        }
    }

    /// Maps `memory` behind its border; it is at least as large.
    pub fn map(&self, memory: &Arc<Memory>, iova: u64, size: u64, flags: u32) -> Result<Answer> {
        let args = MapArgs { memory, offset: BORDER, iova, size, flags, argsz: None };
        status(self.container.map(&args)).map(Answer::of)
    }

    fn unmap(&self, args: &UnmapArgs) -> Result<Answer> {
        Ok(match status(self.container.unmap(args))? {
            Ok(count) => Answer { count, ..Answer::of(Ok(())) },
            Err(errno) => Answer::of(Err(errno)),
        })
    }

    fn unmap_bitmap(&self, iova: u64, size: u64, buffer: &Buffer) -> Result<Answer> {
        let unmap = UnmapArgs { iova, size, ..Default::default() };
        let args = &buffer.args();
        let unmapped = match buffer.memory(size)? {
            None => self.container.unmap_dirty(&unmap, args),
            Some((memory, at)) => self
                .container
                .unmap_dirty_into(&unmap, args, &memory, at)
                .map(|bytes| (bytes, words(&memory, at, size))),
        };
        with_bitmap(status(unmapped)?, size)
    }

    fn get_bitmap(&self, iova: u64, size: u64, buffer: &Buffer) -> Result<Answer> {
        let args = &buffer.args();
        let read = match buffer.memory(size)? {
            None => self.container.dirty_bitmap(iova, size, args),
            Some((memory, at)) => self
                .container
                .dirty_bitmap_into(iova, size, args, &memory, at)
                .map(|()| words(&memory, at, size)),
        };
        with_bitmap(status(read)?.map(|words| (0, words)), size)
    }
}

/// How a command has ended.
fn of_command(outcome: &Outcome) -> Answer {
    let &Outcome { status, count, digest } = outcome;
    let status = match status {
        0 => Ok(()),
        errno => Err(Errno(errno as i32)),
    };
    Answer { count, digest, ..Answer::of(status) }
}

/// Opens the group that these devices share.
fn group_of(devices: &[(usize, DeviceNode)]) -> Result<Group> {
    let (_, node) = devices.first().context("a group without devices")?;
    Ok(Group::open(node)?)
}

impl Buffer {
    fn args(&self) -> BitmapArgs {
        BitmapArgs { pgsize: self.pgsize, size: self.size }
    }

    /// Memory for the bitmap of `size` bytes of IOVA, and where in it the bitmap begins, if this isn't
    /// a buffer like any other.
    fn memory(&self, size: u64) -> Result<Option<(Memory, usize)>> {
        let pages = |bytes: u64| bytes.next_multiple_of(PAGE) as usize;
        let bytes = pages(Container::bitmap_bytes(size, &self.args()).max(1));
        Ok(match self.memory {
            BufferMemory::Whole => None,
            BufferMemory::ReadOnly => {
                let memory = Memory::new(bytes)?;
                memory.set_access(0..bytes, Access::Read)?;
                Some((memory, 0))
            }
            BufferMemory::Ends(writable) => {
                let len = pages(writable.max(1));
                Some((Memory::with_guard(len, bytes)?, len - writable as usize))
            }
        })
    }
}

/// The words of the bitmap of `size` bytes of IOVA that `memory` has; those it hasn't are 0.
fn words(memory: &Memory, at: usize, size: u64) -> Vec<u64> {
    let mut words = vec![0; (size / PAGE).div_ceil(64) as usize];
    for (at, word) in (at..memory.len()).step_by(8).zip(&mut words) {
        let mut bytes = [0; 8];
        memory.read(at, &mut bytes);
        *word = u64::from_ne_bytes(bytes);
    }
    words
}

/// Words behind a bitmap that are looked at, whether they were left alone: a buffer may be large.
const BEHIND: usize = 512;

/// An answer with the bitmap of `size` bytes of IOVA.
fn with_bitmap(result: Result<(u64, Vec<u64>), Errno>, size: u64) -> Result<Answer> {
    let (count, mut words) = match result {
        Ok(done) => done,
        Err(errno) => return Ok(Answer::of(Err(errno))),
    };
    let pages = size / PAGE;
    let len = pages.div_ceil(64) as usize;
    if words[len..].iter().take(BEHIND).any(|&word| word != 0) {
        return Err(
            Failure::new(format!("a bitmap of {pages} pages goes on behind its end")).into()
        );
    }
    words.truncate(len);
    let bitmap = Some(Bitmap::from_words(words, pages));
    Ok(Answer { count, bitmap, ..Answer::of(Ok(())) })
}

/// Tells the errno that a call answered from an error of the tool.
pub fn status<T>(result: Result<T, Error>) -> Result<Result<T, Errno>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) if error.errno() != 0 => Ok(Err(Errno(error.errno()))),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_ends_where_it_must() {
        let answer = |words: Vec<u64>| with_bitmap(Ok((0x1000, words)), 70 * PAGE);
        let good = answer(vec![1, 2, 0, 0]).unwrap();
        assert_eq!((good.count, good.bitmap.unwrap().runs()), (0x1000, vec![0..1, 65..66]));
        // Bits behind the last page are the bitmap's, words are not.
        assert_eq!(answer(vec![0, 1 << 63]).unwrap().bitmap.unwrap().runs(), [127..128]);
        let error = answer(vec![0, 0, 0, 1]).unwrap_err().to_string();
        assert!(error.contains("goes on behind its end"), "{error}");
        let failed = with_bitmap(Err(Errno::EFAULT), 70 * PAGE).unwrap();
        assert_eq!((failed.status, failed.bitmap), (Err(Errno::EFAULT), None));
    }

    #[test]
    fn buffers_end_where_they_are_to() {
        let buffer = Buffer::covering(200 * PAGE);
        let memory = |memory, size| buffer.with_memory(memory).memory(size).unwrap();
        assert!(memory(BufferMemory::Whole, 200 * PAGE).is_none());
        let (ends, at) = memory(BufferMemory::Ends(8), 200 * PAGE).unwrap();
        assert_eq!((ends.len() - at, ends.span() - ends.len()), (8, PAGE as usize));
        ends.write(at, &[7; 8]);
        assert_eq!(words(&ends, at, 200 * PAGE), [0x0707_0707_0707_0707, 0, 0, 0]);
        let (read_only, at) = memory(BufferMemory::ReadOnly, 200 * PAGE).unwrap();
        assert_eq!((read_only.len(), at), (PAGE as usize, 0));
        assert_eq!(words(&read_only, at, 200 * PAGE), [0; 4]);
    }
}
