// SPDX-License-Identifier: GPL-2.0-only

//! Operations as text: what is shown of what led to a failure, and what a file holds that is to be
//! replayed. What is shown can be read back.
//!
//! ```text
//! MAP 0x40000000+0x46000 rw [memory 0x1000]      memory behind the first bytes only
//! UNMAP 0x40000000+0x46000
//! UNMAP_BITMAP 0x40000000+0x46000 [pgsize N] [size N] [ends N | read-only]
//! START | STOP
//! GET_BITMAP 0x40000000+0x46000 [as UNMAP_BITMAP]
//! MAP, UNMAP, DIRTY_PAGES ... flags N            other flags than these imply
//! device 0 JOIN | LEAVE [close] | OPEN | CLOSE | RESET
//! device 0 [background] DMA_WRITE 0x40000000+0x1000 [seed N]   or another, also by its number
//! device 2 COPY 0x40000000+0x1000 to 0x40008000  edu's DMA
//! device 0 [background] RAW_PIN | RAW_UNPIN 0x40000800+0x1000 [prot N]
//! process HIDE | SHOW | WRITE 0x40000000+0x1000 [seed N]
//! CHECK
//! ```

use crate::{Answer, Buffer, BufferMemory, Op, operation};
use anyhow::{Context as _, Error, Result, bail};
use mdev_dma::{Opcode, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use std::{
    fmt::{self, Display, Formatter},
    str::{FromStr, SplitWhitespace},
};
use vfio_client::{
    Leave,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

const RW: u32 = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;

impl Display for Op {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Map { iova, size, backed, flags } => {
                let read = if flags & VFIO_DMA_MAP_FLAG_READ != 0 { "r" } else { "-" };
                let write = if flags & VFIO_DMA_MAP_FLAG_WRITE != 0 { "w" } else { "-" };
                write!(f, "MAP {iova:#x}+{size:#x} {read}{write}")?;
                option(f, "memory", backed, size)?;
                option(f, "flags", (flags & !RW).into(), 0)
            }
            Self::Unmap { iova, size, flags } => {
                write!(f, "UNMAP {iova:#x}+{size:#x}")?;
                option(f, "flags", flags.into(), 0)
            }
            Self::UnmapBitmap { iova, size, buffer } => {
                write!(f, "UNMAP_BITMAP {iova:#x}+{size:#x}")?;
                show_buffer(f, size, &buffer)
            }
            Self::Start => f.write_str("START"),
            Self::Stop => f.write_str("STOP"),
            Self::DirtyPages { flags } => write!(f, "DIRTY_PAGES flags {flags:#x}"),
            Self::GetBitmap { iova, size, buffer } => {
                write!(f, "GET_BITMAP {iova:#x}+{size:#x}")?;
                show_buffer(f, size, &buffer)
            }
            Self::Join { device } => write!(f, "device {device} JOIN"),
            Self::Leave { device, by: Leave::Unset } => write!(f, "device {device} LEAVE"),
            Self::Leave { device, by: Leave::Close } => write!(f, "device {device} LEAVE close"),
            Self::Open { device } => write!(f, "device {device} OPEN"),
            Self::Close { device } => write!(f, "device {device} CLOSE"),
            Self::Reset { device } => write!(f, "device {device} RESET"),
            Self::Command { device, op, iova, length, seed } => {
                write!(f, "device {device} ")?;
                if op & BACKGROUND != 0 {
                    write!(f, "background ")?;
                }
                match operation(op) {
                    Some(op) => write!(f, "{op}")?,
                    None => write!(f, "{}", op & !BACKGROUND)?,
                }
                write!(f, " {iova:#x}+{length:#x}")?;
                option(f, seed_name(op), seed, 0)
            }
            Self::Copy { device, from, to, length } => {
                write!(f, "device {device} COPY {from:#x}+{length:#x} to {to:#x}")
            }
            Self::Hide { iova, size } => write!(f, "process HIDE {iova:#x}+{size:#x}"),
            Self::Show { iova, size } => write!(f, "process SHOW {iova:#x}+{size:#x}"),
            Self::UserWrite { iova, length, seed } => {
                write!(f, "process WRITE {iova:#x}+{length:#x}")?;
                option(f, "seed", seed, 0)
            }
            Self::Check => f.write_str("CHECK"),
        }
    }
}

/// What the seed of a command is.
fn seed_name(op: u32) -> &'static str {
    match operation(op) {
        Some(Opcode::RawPin | Opcode::RawUnpin) => "prot",
        _ => "seed",
    }
}

/// Shows an option that hasn't its default.
fn option(f: &mut Formatter<'_>, name: &str, value: u64, default: u64) -> fmt::Result {
    if value == default {
        return Ok(());
    }
    write!(f, " {name} {value:#x}")
}

fn show_buffer(f: &mut Formatter<'_>, size: u64, buffer: &Buffer) -> fmt::Result {
    let default = Buffer::covering(size);
    option(f, "pgsize", buffer.pgsize, default.pgsize)?;
    option(f, "size", buffer.size, default.size)?;
    match buffer.memory {
        BufferMemory::Whole => Ok(()),
        BufferMemory::Ends(bytes) => write!(f, " ends {bytes:#x}"),
        BufferMemory::ReadOnly => f.write_str(" read-only"),
    }
}

impl<E: Display> Display for Answer<E> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.status {
            Ok(()) => write!(f, "ok")?,
            Err(errno) => write!(f, "{errno}")?,
        }
        if self.count != 0 {
            write!(f, " {:#x} bytes", self.count)?;
        }
        if self.digest != 0 {
            write!(f, " digest {:#x}", self.digest)?;
        }
        if let Some(bitmap) = &self.bitmap {
            let runs = bitmap.runs();
            write!(f, " {} dirty", runs.iter().map(|run| run.end - run.start).sum::<u64>())?;
        }
        Ok(())
    }
}

impl FromStr for Op {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self> {
        let mut words = Words(line.split_whitespace());
        let op = words.op().with_context(|| format!("in {line:?}"))?;
        match words.0.next() {
            None => Ok(op),
            Some(word) => bail!("in {line:?}: {word:?} doesn't belong there"),
        }
    }
}

/// The words of a line that are not read yet.
struct Words<'a>(SplitWhitespace<'a>);

impl<'a> Words<'a> {
    fn op(&mut self) -> Result<Op> {
        match self.word()? {
            "MAP" => {
                let (iova, size) = self.range()?;
                let rw = match self.word()? {
                    "rw" => RW,
                    "r-" => VFIO_DMA_MAP_FLAG_READ,
                    "-w" => VFIO_DMA_MAP_FLAG_WRITE,
                    "--" => 0,
                    other => bail!("{other:?} is none of rw, r-, -w, --"),
                };
                let backed = self.option("memory")?.unwrap_or(size);
                Ok(Op::Map { iova, size, backed, flags: rw | self.flags()? })
            }
            "UNMAP" => {
                let (iova, size) = self.range()?;
                Ok(Op::Unmap { iova, size, flags: self.flags()? })
            }
            "UNMAP_BITMAP" => {
                let (iova, size) = self.range()?;
                Ok(Op::UnmapBitmap { iova, size, buffer: self.buffer(size)? })
            }
            "GET_BITMAP" => {
                let (iova, size) = self.range()?;
                Ok(Op::GetBitmap { iova, size, buffer: self.buffer(size)? })
            }
            "START" => Ok(Op::Start),
            "STOP" => Ok(Op::Stop),
            "DIRTY_PAGES" => Ok(Op::DirtyPages { flags: self.flags()? }),
            "CHECK" => Ok(Op::Check),
            "device" => self.device(),
            "process" => self.process(),
            other => bail!("{other:?} is no operation"),
        }
    }

    fn device(&mut self) -> Result<Op> {
        let device = self.number()? as usize;
        let flags = if self.keyword("background") { BACKGROUND } else { 0 };
        let name = self.word()?;
        let op = match name {
            "JOIN" => return Ok(Op::Join { device }),
            "LEAVE" => {
                let by = if self.keyword("close") { Leave::Close } else { Leave::Unset };
                return Ok(Op::Leave { device, by });
            }
            "COPY" => {
                let (from, length) = self.range()?;
                let to = self.option("to")?.context("COPY needs to ADDRESS")?;
                return Ok(Op::Copy { device, from, to, length });
            }
            "OPEN" => return Ok(Op::Open { device }),
            "CLOSE" => return Ok(Op::Close { device }),
            "RESET" => return Ok(Op::Reset { device }),
            _ => match Opcode::from_name(name) {
                Some(op) => op as u32,
                None => name.parse().with_context(|| format!("{name:?} is no operation"))?,
            },
        };
        let (iova, length) = self.range()?;
        Ok(Op::Command {
            device,
            op: op | flags,
            iova,
            length,
            seed: self.option(seed_name(op))?.unwrap_or(0),
        })
    }

    fn process(&mut self) -> Result<Op> {
        let name = self.word()?;
        let (iova, size) = self.range()?;
        match name {
            "HIDE" => Ok(Op::Hide { iova, size }),
            "SHOW" => Ok(Op::Show { iova, size }),
            "WRITE" => {
                let seed = self.option("seed")?.unwrap_or(0);
                Ok(Op::UserWrite { iova, length: size, seed })
            }
            other => bail!("a process doesn't {other:?}"),
        }
    }

    fn buffer(&mut self, size: u64) -> Result<Buffer> {
        let default = Buffer::covering(size);
        let pgsize = self.option("pgsize")?.unwrap_or(default.pgsize);
        let size = self.option("size")?.unwrap_or(default.size);
        let memory = match self.option("ends")? {
            Some(bytes) => BufferMemory::Ends(bytes),
            None if self.keyword("read-only") => BufferMemory::ReadOnly,
            None => BufferMemory::Whole,
        };
        Ok(Buffer { pgsize, size, memory })
    }

    fn flags(&mut self) -> Result<u32> {
        Ok(self.option("flags")?.unwrap_or(0).try_into()?)
    }

    fn word(&mut self) -> Result<&'a str> {
        self.0.next().context("the line ends too early")
    }

    /// Reads the next word if it is this one.
    fn keyword(&mut self, name: &str) -> bool {
        let found = self.0.clone().next() == Some(name);
        if found {
            self.0.next();
        }
        found
    }

    /// Reads `name NUMBER`, if that is what comes next.
    fn option(&mut self, name: &str) -> Result<Option<u64>> {
        self.keyword(name).then(|| self.number()).transpose()
    }

    fn number(&mut self) -> Result<u64> {
        parse_number(self.word()?)
    }

    fn range(&mut self) -> Result<(u64, u64)> {
        let word = self.word()?;
        let (start, size) =
            word.split_once('+').with_context(|| format!("{word:?} is no range"))?;
        Ok((parse_number(start)?, parse_number(size)?))
    }
}

fn parse_number(word: &str) -> Result<u64> {
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => word.parse(),
    }
    .with_context(|| format!("{word:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_can_be_read() {
        for line in [
            "MAP 0x1000+0x2000 rw",
            "MAP 0x0+0x2000 -- memory 0x0 flags 0x80000004",
            "UNMAP 0x0+0x0 flags 0x2",
            "UNMAP_BITMAP 0x1000+0x2000 ends 0x0",
            "GET_BITMAP 0x1000+0x2000 pgsize 0x0 size 0x10 read-only",
            "GET_BITMAP 0x1000+0x2000",
            "START",
            "STOP",
            "DIRTY_PAGES flags 0x3",
            "device 1 OPEN",
            "device 2 JOIN",
            "device 2 LEAVE close",
            "device 2 LEAVE",
            "device 4 COPY 0x1000+0x10 to 0x2008",
            "device 0 DMA_WRITE 0x1fff+0x2 seed 0x1",
            "device 0 background PIN 0x1000+0x1000",
            "device 1 background 0 0x1000+0x1000",
            "device 0 RAW_PIN 0x40000800+0x200000 prot 0x3",
            "device 0 background RAW_UNPIN 0x40000800+0x1000",
            "device 1 RAW_WRITE 0x40000800+0x1000 seed 0x2",
            "device 0 77 0x0+0xffffffffffffffff",
            "process HIDE 0x1000+0x1000",
            "process WRITE 0x1000+0x7 seed 0x2",
            "CHECK",
        ] {
            assert_eq!(line.parse::<Op>().unwrap().to_string(), line);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, what) in [
            ("MAP 0x1000 rw", "\"0x1000\" is no range"),
            ("MAP 0x1000+0x2000", "the line ends too early"),
            ("MAP 0x1000+0x2000 rx", "\"rx\" is none of"),
            ("STOP it", "\"it\" doesn't belong there"),
            ("GO", "\"GO\" is no operation"),
            ("device 0 PIN 0xg+1", "\"0xg\" is no number"),
            ("", "the line ends too early"),
        ] {
            let error = format!("{:#}", line.parse::<Op>().unwrap_err());
            assert!(error.contains(what), "{error}");
        }
    }
}
