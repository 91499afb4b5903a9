// SPDX-License-Identifier: GPL-2.0-only

//! A page is what it was. If it is to be another: look at it, and `BLESS=1 cargo test -p report`.

use events::Event;
use std::{env, fs, path::Path};

/// Two devices, a pin that is lost, a page that is spurious, hidden memory, mappings far apart.
const STREAM: &str = r##"
{"event":"run","version":1,"engine":"verify","arguments":["verify"],"kernel":"7.3.4","planned":3}
{"event":"begin","name":"type1/a","about":"it passes"}
{"event":"result","name":"type1/a","verdict":"pass","seconds":0.1}
{"event":"begin","name":"type1/b","about":"pages <are> lost & found"}
{"event":"call","n":1,"op":"device 0 OPEN","kind":"other","thread":7,"device":0,"group":3}
{"event":"call","n":2,"op":"MAP 0x1000+0x4000 rw","kind":"map","range":[4096,20480],"thread":7}
{"event":"answer","n":2,"model":{"text":"ok","ok":true,"count":0},"kernel":{"text":"ok","ok":true,"count":0}}
{"event":"call","n":3,"op":"MAP 0x40000000+0x1000 rw","kind":"map","range":[1073741824,1073745920],"thread":7}
{"event":"answer","n":3,"model":{"text":"ok","ok":true,"count":0},"kernel":{"text":"ok","ok":true,"count":0}}
{"event":"call","n":4,"op":"START","kind":"start","thread":7}
{"event":"answer","n":4,"model":{"text":"ok","ok":true,"count":0},"kernel":{"text":"ok","ok":true,"count":0}}
{"event":"call","n":5,"op":"device 1 PIN 0x1000+0x1000","kind":"pin","range":[4096,8192],"thread":8,"device":1,"group":4}
{"event":"answer","n":5,"model":{"text":"ok 0x1000 bytes","ok":true,"count":4096},"kernel":{"text":"ok 0x1000 bytes","ok":true,"count":4096}}
{"event":"call","n":6,"op":"process HIDE 0x4000+0x1000","kind":"hide","range":[16384,20480],"thread":7}
{"event":"answer","n":6,"model":{"text":"ok","ok":true,"count":0},"kernel":{"text":"ok","ok":true,"count":0}}
{"event":"call","n":7,"op":"device 0 DMA_WRITE 0x3000+0x2000","kind":"write","range":[12288,20480],"thread":7,"device":0,"group":3}
{"event":"answer","n":7,"model":{"text":"EFAULT 0x1000 bytes","ok":false,"count":4096},"kernel":{"text":"EFAULT 0x1000 bytes","ok":false,"count":4096}}
{"event":"call","n":8,"op":"UNMAP 0x40000000+0x1000","kind":"unmap","range":[1073741824,1073745920],"thread":7}
{"event":"answer","n":8,"model":{"text":"ok 0x1000 bytes","ok":true,"count":4096},"kernel":{"text":"ok 0x1000 bytes","ok":true,"count":4096}}
{"event":"note","text":"now it is read"}
{"event":"call","n":9,"op":"GET_BITMAP 0x1000+0x4000","kind":"read","range":[4096,20480],"thread":7}
{"event":"answer","n":9,"model":{"text":"ok 2 dirty","ok":true,"count":0,"dirty":[[4096,8192],[12288,16384]]},"kernel":{"text":"ok 2 dirty","ok":true,"count":0,"dirty":[[4096,12288]]}}
{"event":"kernel","seconds":12.5,"text":"vfio: said so","complaint":false}
{"event":"difference","what":"GET_BITMAP 0x1000+0x4000: the bitmap is wrong","lost":[[12288,16384]],"spurious":[[8192,12288]]}
{"event":"result","name":"type1/b","verdict":"fail","why":"GET_BITMAP 0x1000+0x4000: the bitmap is wrong","seconds":0.2}
{"event":"begin","name":"migrate/c","about":"a machine migrates"}
{"event":"pass","number":1,"sent":1048576,"remaining":65536}
{"event":"pass","number":2,"sent":1114112,"remaining":4096}
{"event":"result","name":"migrate/c","verdict":"known","defect":"D5","why":"it is known","seconds":0.3}
{"event":"end","stopped":false}
"##;

#[test]
fn a_page_is_what_it_was() {
    let lines = STREAM.lines().filter(|line| !line.is_empty());
    let events: Vec<_> = lines.map(|line| Event::from_line(line).unwrap()).collect();
    let page = report::page(&events).replace("><", ">\n<");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page.html");
    if env::var_os("BLESS").is_some() {
        fs::write(&golden, &page).unwrap();
    }
    let expected = fs::read_to_string(&golden).unwrap_or_default();
    let differs = |(page, expected): &(&str, &str)| page != expected;
    if let Some((page, expected)) = page.lines().zip(expected.lines()).find(differs) {
        panic!("the page says\n{page}\ninstead of\n{expected}");
    }
    assert_eq!(page.lines().count(), expected.lines().count());
}
