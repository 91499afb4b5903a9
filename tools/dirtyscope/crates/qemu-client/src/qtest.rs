// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result};
use mdev_dma::{RegisterAccess, Width};
use std::{
    cell::RefCell,
    collections::BTreeSet,
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
};

/// Ports through which a PC accesses PCI configuration space.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

/// How qtest calls a width.
fn suffix(width: Width) -> char {
    match width {
        Width::Byte => 'b',
        Width::Word => 'w',
        Width::Long => 'l',
        Width::Quad => 'q',
    }
}

/// A machine as its CPU sees it: the protocol of `system/qtest.c` in QEMU's source.
pub struct Qtest {
    connection: RefCell<BufReader<UnixStream>>,
    /// Inputs of an interrupt controller that are high.
    raised: RefCell<BTreeSet<u32>>,
}

impl Qtest {
    pub(crate) fn new(connection: UnixStream) -> Self {
        Self { connection: RefCell::new(BufReader::new(connection)), raised: RefCell::default() }
    }

    /// Reads from a physical address.
    pub fn read(&self, address: u64, width: Width) -> Result<u64> {
        self.ask_value(&format!("read{} {address:#x}", suffix(width)))
    }

    /// Writes to a physical address.
    pub fn write(&self, address: u64, width: Width, value: u64) -> Result<()> {
        self.ask(&format!("write{} {address:#x} {value:#x}", suffix(width))).map(drop)
    }

    /// The registers of a device whose BAR 0 is at a physical address.
    pub fn bar(&self, address: u64) -> Bar<'_> {
        Bar { qtest: self, address }
    }

    /// Reads the configuration space of function 0 of a device on PCI bus 0, no [`Width::Quad`].
    pub fn config_read(&self, slot: u8, offset: u8, width: Width) -> Result<u32> {
        let port = self.config_select(slot, offset)?;
        Ok(self.ask_value(&format!("in{} {port:#x}", suffix(width)))? as u32)
    }

    /// Writes the configuration space of function 0 of a device on PCI bus 0, no [`Width::Quad`].
    pub fn config_write(&self, slot: u8, offset: u8, width: Width, value: u32) -> Result<()> {
        let port = self.config_select(slot, offset)?;
        self.ask(&format!("out{} {port:#x} {value:#x}", suffix(width))).map(drop)
    }

    /// Returns the port where the register can be accessed then.
    fn config_select(&self, slot: u8, offset: u8) -> Result<u16> {
        const ENABLE: u32 = 1 << 31;
        let address = ENABLE | (u32::from(slot) << 11) | u32::from(offset & !3);
        self.ask(&format!("outl {CONFIG_ADDRESS:#x} {address:#x}"))?;
        Ok(CONFIG_DATA + u16::from(offset & 3))
    }

    /// Watches the inputs of an interrupt controller, which gets nothing of it any more.
    pub fn watch_interrupts(&self, controller: &str) -> Result<()> {
        self.ask(&format!("irq_intercept_in {controller}")).map(drop)
    }

    /// Inputs of the watched controller that were high at the last access.
    pub fn raised(&self) -> Vec<u32> {
        self.raised.borrow().iter().copied().collect()
    }

    fn ask_value(&self, command: &str) -> Result<u64> {
        let answer = self.ask(command)?;
        let digits = answer.strip_prefix("0x").unwrap_or(&answer);
        u64::from_str_radix(digits, 16)
            .map_err(|_| Error::Refused { what: format!("qtest {command}"), answer })
    }

    /// What comes after "OK".
    fn ask(&self, command: &str) -> Result<String> {
        let what = || format!("qtest {command}");
        let answer =
            self.exchange(command).map_err(|source| Error::Lost { what: what(), source })?;
        match answer.strip_prefix("OK") {
            Some(rest) => Ok(rest.trim().into()),
            None => Err(Error::Refused { what: what(), answer }),
        }
    }

    fn exchange(&self, command: &str) -> io::Result<String> {
        let mut connection = self.connection.borrow_mut();
        connection.get_mut().write_all(format!("{command}\n").as_bytes())?;
        loop {
            let mut line = String::new();
            if connection.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // Changes of watched interrupts come in between.
            match line.trim_end().strip_prefix("IRQ ") {
                Some(change) => self.interrupt(change),
                None => return Ok(line.trim_end().into()),
            }
        }
    }

    fn interrupt(&self, change: &str) {
        let mut raised = self.raised.borrow_mut();
        match change.split_once(' ').map(|(what, input)| (what, input.parse())) {
            Some(("raise", Ok(input))) => _ = raised.insert(input),
            Some(("lower", Ok(input))) => _ = raised.remove(&input),
            _ => {}
        }
    }
}

/// The registers of a device in the machine.
pub struct Bar<'a> {
    qtest: &'a Qtest,
    address: u64,
}

impl RegisterAccess for Bar<'_> {
    type Error = Error;

    fn read(&self, register: u32, width: Width) -> Result<u64> {
        self.qtest.read(self.address + u64::from(register), width)
    }

    fn write(&self, register: u32, width: Width, value: u64) -> Result<()> {
        self.qtest.write(self.address + u64::from(register), width, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Read, thread};

    /// Answers one command with `answer`; returns what the command was.
    fn answering(answer: &'static str, ask: impl FnOnce(&Qtest)) -> String {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut command = [0; 64];
            let n = theirs.read(&mut command).unwrap();
            theirs.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&command[..n]).into_owned()
        });
        ask(&Qtest::new(ours));
        server.join().unwrap()
    }

    #[test]
    fn values() {
        let command = answering("OK 0x00000000deadbeef\n", |qtest| {
            assert_eq!(qtest.read(0x1000, Width::Long).unwrap(), 0xdead_beef);
        });
        assert_eq!(command, "readl 0x1000\n");
    }

    #[test]
    fn interrupts_in_between() {
        answering("IRQ raise 16\nIRQ raise 20\nIRQ lower 16\nOK\n", |qtest| {
            qtest.write(0x1000, Width::Quad, 1).unwrap();
            assert_eq!(qtest.raised(), [20]);
        });
    }

    #[test]
    fn refusals_and_ends() {
        answering("FAIL Unknown command 'readl'\n", |qtest| {
            let error = qtest.read(0, Width::Long).unwrap_err().to_string();
            assert_eq!(error, "qtest readl 0x0: FAIL Unknown command 'readl'");
        });
        answering("", |qtest| {
            let error = qtest.read(0, Width::Long).unwrap_err().to_string();
            assert_eq!(error, "qtest readl 0x0: QEMU has ended");
        });
    }
}
