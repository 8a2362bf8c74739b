// The page's own words in English and Chinese. Names and texts from the server stay as they come.
//
//   word("queued", { before: 2 })  // "2 before you"

const en = {
  skip: "Skip to the panel", panels: "Panels", examples: "Examples", dark: "Dark", token: "token", tokens: "tokens", probability: "probability", none: "no value",
  look: "Look", think: "Think or look up", teach: "Teach", quiz: "Quiz",
  working: "Working …", writing: "writing …", stop: "Stop", stopped: "Stopped.", queued: "{before} before you", busy: "The model is at work; {waiting} waiting.",
  loading: "The model is being loaded.", lost: "The server does not answer. It may have been stopped; this page waits for it.", back: "The server answers again. If it was started anew, reload the page.", reload: "Reload",
  "about.none": "Asking the server …", "about.model": "{name}, {size} parameters", "about.tables": "learned tables: {rows} rows in layers {layers}, {size}", "about.tables.none": "no learned tables",
  "about.index": "exact index: {documents:document}, {tokens:token}", "about.index.none": "no index",
  footer: "Everything is computed by the server on this machine; nothing is sent elsewhere.",
  "error.lost": "The server does not answer. It may have been stopped: start it again with “engram-lm serve”, then press the button once more.",
  "error.broke": "The answer broke off before its end. Press the button once more.", "error.status": "The server refused with status {status} and gave no reason.",
  "error.large": "This is {size}, and the server takes at most {limit} at once. Send less.", "error.reload": "If the server was started anew, reload this page.", "error.page": "This page made a mistake: {message}",

  "look.title": "Where memory speaks",
  "look.lead": "Each token is as red as the memory you choose had a part in it. N-gram memory knows wording it has read, not what follows from it: red says that these words were seen before, not that they are true.",
  "look.text": "Text", "look.trace": "Trace", "look.empty": "There is no text to trace. Type some, or press an example.", "look.done": "{tokens:token} in {ms}", "look.follows": "– what the tables saved follows",
  "look.shown": "Heat shows", "look.tokens": "Tokens of the text: arrow keys move, Enter opens the details, Escape closes them",
  "look.nothing": "This server holds neither learned tables nor an index, so there is nothing to colour.",
  "card.title": "One token", "card.empty": "Point at a token, or tap it, to see what the memories did there.", "card.close": "Close the details", "card.place": "token {place}, id {id}",
  "card.index": "When it was predicted: the exact index", "card.tables": "When it was read: the learned tables", "card.first": "The first token is not predicted.",
  "card.no.index": "No index is mixed in.", "card.no.tables": "No learned tables are attached.",
  "card.match.told": "The {depth:token} before it: found {count:time} in {documents:document}, followed by {distinct:different token}.", "card.match.none": "What stands before it is nowhere in the documents.",
  "card.loss.off": "Loss without memory", "card.loss.tables": "with the tables", "card.loss.both": "with tables and index", "card.loss.index": "with the index", nats: "{value} nats", saved: "{value} saved",
  "p.model": "P model", "p.memory": "P memory", "p.mix": "P mix",
  "card.layer": "Layer {layer}", "card.gate": "gate", "card.branch": "gate of branch {branch}", "card.added": "Added to the hidden state: {value} of its norm.", "card.ngrams": "N-grams of layer {layer}",
  "card.ngram": "n-gram", "card.seen": "in the index", "card.norm": "row norm", "card.addresses": "Addresses, one a head", "card.order": "Its last {order} tokens", "card.times": "{count:time}",
  "card.sources": "Where it stands", "card.sources.none": "No passage was found.", "card.looking": "Looking …",
  "m.group.index": "Exact index", "m.group.tables": "Learned tables", "m.group.loss": "Loss saved (blue: made worse)",
  "m.r": "r, the index's share of the token", "m.r.note": "r = λ × P memory / P: the part of this token's probability that the exact index gave.",
  "m.lambda": "λ, how much the index was trusted", "m.lambda.note": "λ is what the gate of the exact index let in before the token was known.",
  "m.gate": "gate", "m.gate.mean": "gates, mean of all", "m.gate.layer": "gate of layer {layer}", "m.gate.branch": "gate of layer {layer}, branch {branch}",
  "m.gate.note": "A gate of the learned tables, where the model reads the token; it is near 0.5 where the rows are zero, and acts on the next token. No single gate is the truth.",
  "m.added": "added by layer {layer}", "m.added.told": "added {value} of the norm", "m.added.note": "How much the learned tables added where the model reads the token: |added| / |hidden state|. The scale ends at this text's largest value.",
  "m.saved.both": "loss saved by both", "m.saved.index": "loss saved by the index", "m.saved.tables": "loss saved by the tables", "m.saved.told": "{value} nats saved",
  "m.saved.note": "How much less surprised the model was by the token, in nats. Blue is harm: memory made the token less likely.", "m.tables.heat": "learned tables",
  "scatter.title": "What does it follow?", "scatter.lead": "Each dot is a token. If the value only followed how often an n-gram was seen, the dots on frequency would lie on a line and those on saved loss would not. Frequencies are counts in the exact index.",
  "scatter.order": "Frequency of", "scatter.words": "the last {n:token}", "scatter.frequency": "count of its last {n:token}", "scatter.saved": "loss saved on it, nats", "scatter.saved.next": "loss saved on the next token, nats",
  "scatter.saved.short": "loss saved", "scatter.seen": "in the index", "scatter.against": "against", "scatter.numbers": "The same as a table", "scatter.table": "{name}, frequency and loss saved, token by token",
  "scatter.few": "Too few tokens for a correlation: {n}.", "scatter.flat": "One of the two does not vary over these tokens ({n}).", "scatter.said": "Pearson {r}, Spearman {rho}, {n:token}: {verdict}.",
  "scatter.none": "no clear link", "scatter.some": "a weak link", "scatter.much": "a clear link",
  "two.title": "The two memories", "two.tables": "Learned tables", "two.tables.what": "Rows trained beside the model. Hashed n-grams say which rows are read; a gate decides how much of them is added to the hidden state. They change by training only.",
  "two.index": "Exact index", "two.index.what": "Counts of the documents' own words. P = (1 − λ) P model + λ P memory, and a gate sets λ at each token. It changes the moment a document is added or deleted.",

  "think.title": "What the model would say, and what stands written",
  "think.lead": "The next token by the model alone, by the exact index, and by their mix. Memory recalls how a text went on after the same words; it does not think about the question.",
  "think.prompt": "Prompt", "think.candidates": "Candidates to compare, one a line", "think.tables": "learned tables", "think.index": "exact index", "think.lambda": "λ, trust in the index",
  "think.rest": "Gate's λ", "lambda.gate": "set by the gate", "lambda.gate.is": "{value}, set by the gate", "lambda.pinned": "{value}, pinned",
  "think.next": "Next token", "think.generate": "Generate", "think.length": "tokens", "think.empty": "There is no prompt. Type one, or press an example.", "think.done": "done in {ms}",
  "think.match": "The last {depth:token}, found {count:time} in {documents:document}:", "think.match.none": "The end of this prompt stands nowhere in the documents.", "think.match.off": "The index is off.",
  "think.alone": "Model alone", "think.memory": "Memory (exact index)", "think.mix": "Mix, λ {value}", "think.alone.none": "Nothing.", "think.memory.none": "Nothing in the documents goes on from here.",
  "think.sources": "Where it stands", "think.written": "Generated text", written: "{tokens:token} in {ms}, the first after {first}",
  "chances.title": "Candidates", "chances.lead": "P of each whole candidate, the product over its tokens of (1 − λ) P model + λ P memory. Below each, its tokens. Move λ and watch; red is memory's part.",
  "chances.candidate": "candidate", "chances.share": "among these", "chances.p": "P",
  "match.short": "match of {depth:token}, {count:time} in {documents:document}", "match.short.none": "no match",

  "teach.title": "Add knowledge, ask, take it away again",
  "teach.lead": "A document is known the moment it is indexed, without training, and gone the moment it is deleted. It is found by its wording: a question in quite other words may miss it.",
  "teach.example": "Add an example and see", "teach.drop": "Drop text files here", "teach.pick": "Choose files", "teach.name": "Name", "teach.paste": "Or paste a text", "teach.add": "Add to memory",
  "teach.empty": "There is no text to add. Paste one, or drop a file.", "teach.adding": "Indexing …", "teach.deleting": "Deleting …", "teach.log": "Log", "teach.document": "document", "teach.documents": "Documents: {count}",
  "teach.delete": "Delete", "teach.delete.one": "Delete {name}", "teach.more": "More", "teach.none": "No documents yet.", "teach.no.index": "This server holds no index. Start it with --index DIR to add documents.",
  "teach.ask.title": "Ask it three ways", "teach.question": "Question, or the beginning of a sentence", "teach.ask": "Ask", "teach.chat": "as a chat turn", "teach.ask.empty": "There is no question. Type one, or press an example.",
  "teach.asked": "Delete a document and ask again.",
  "log.added": "indexed {tokens:token} in {ms}", "log.deleted": "deleted {name} in {ms}", "log.found": "found in {documents:document}, match of {depth:token}, λ {lambda}", "log.not.found": "memory had no part in this answer",
  "file.encoding": "{name} is not UTF-8 text. Save it as UTF-8 and drop it again.", "file.empty": "{name} is empty.", "file.large": "{name} is {size}; at most {limit} fit into one request. Split it.", "file.unread": "{name} could not be read.",
  "arm.alone": "Model alone", "arm.alone.what": "exact index off", "arm.retrieval": "Retrieval", "arm.retrieval.what": "passages put into the prompt", "arm.memory": "Memory", "arm.memory.what": "exact index mixed in, nothing in the prompt",
  cost: "{prompt:prompt token}, {tokens} generated in {ms}, the first after {first}",

  "quiz.title": "Closed book", "quiz.lead": "Facts of an invented company that nobody can know beforehand. You answer first. Questions in the document's own words and in other words are counted apart, because memory recalls wording: the second kind shows what it cannot do.",
  "quiz.count": "Question {place} of {all}", "quiz.verbatim": "document's words", "quiz.paraphrased": "other words", "quiz.yours": "Your answer", "quiz.answer": "Answer", "quiz.unknown": "I do not know", "quiz.skip": "Skip", "quiz.next": "Next question",
  "quiz.expected": "It says:", "quiz.from": "in {name}", "quiz.table": "Answers", "quiz.told": "Right: {names}.", "quiz.none": "This server has no quiz.", "quiz.end": "That was the last question", "quiz.end.what": "The scores stay until you reload the page.", "quiz.again": "From the beginning",
  "quiz.scores": "Scores", "quiz.scores.caption": "Right answers of those given", "quiz.scores.note": "right / asked",
  player: "player", answer: "answer", result: "result", time: "time", "prompt.tokens": "prompt tokens", right: "right", wrong: "wrong", nobody: "nobody",
  "player.you": "You", "player.alone": "Model alone", "player.retrieval": "Retrieval", "player.memory": "Memory",
};

const zh = {
  skip: "跳到面板", panels: "面板", examples: "示例", dark: "深色", token: "词元", tokens: "词元数", probability: "概率", none: "无数值",
  look: "看", think: "想还是查", teach: "教", quiz: "测验",
  working: "计算中……", writing: "正在生成……", stop: "停止", stopped: "已停止。", queued: "前面还有 {before} 个请求", busy: "模型正在计算，{waiting} 个请求在等待。",
  loading: "正在加载模型。", lost: "服务器没有回应，可能已经停止；本页在等它。", back: "服务器恢复了回应。如果它是重新启动的，请刷新页面。", reload: "刷新",
  "about.none": "正在询问服务器……", "about.model": "{name}，{size} 参数", "about.tables": "学习到的表：第 {layers} 层，{rows} 行，{size}", "about.tables.none": "没有学习到的表",
  "about.index": "精确索引：{documents} 篇文档，{tokens} 个词元", "about.index.none": "没有索引",
  footer: "一切都由本机上的服务器计算，不会发送到别处。",
  "error.lost": "服务器没有回应，可能已经停止：请用“engram-lm serve”重新启动，然后再按一次。",
  "error.broke": "回答在结束前中断了，请再按一次。", "error.status": "服务器以状态码 {status} 拒绝了请求，没有说明原因。",
  "error.large": "这里有 {size}，服务器一次最多接收 {limit}，请减少内容。", "error.reload": "如果服务器是重新启动的，请刷新本页。", "error.page": "本页出错：{message}",

  "look.title": "记忆在哪里说话",
  "look.lead": "所选的记忆对一个词元起的作用越大，它就越红。N 元组记忆只认得读过的措辞，不会推理：红色表示这些词见过，不表示它们是真的。",
  "look.text": "文本", "look.trace": "追踪", "look.empty": "没有可追踪的文本。请输入，或按一个示例。", "look.done": "{tokens} 个词元，用时 {ms}", "look.follows": "——表节省的损失随后显示",
  "look.shown": "颜色表示", "look.tokens": "文本的词元：方向键移动，回车打开详情，Esc 关闭",
  "look.nothing": "这个服务器既没有学习到的表，也没有索引，没有可着色的内容。",
  "card.title": "一个词元", "card.empty": "指向或点按一个词元，看记忆在那里做了什么。", "card.close": "关闭详情", "card.place": "第 {place} 个词元，编号 {id}",
  "card.index": "预测它时：精确索引", "card.tables": "读到它时：学习到的表", "card.first": "第一个词元没有被预测。",
  "card.no.index": "没有混入索引。", "card.no.tables": "没有附加学习到的表。",
  "card.match.told": "它前面的 {depth} 个词元在文档里出现 {count} 次，见于 {documents} 篇文档，后面有 {distinct} 种不同的词元。", "card.match.none": "它前面的内容在文档里没有出现。",
  "card.loss.off": "没有记忆时的损失", "card.loss.tables": "有表时", "card.loss.both": "有表和索引时", "card.loss.index": "有索引时", nats: "{value} 奈特", saved: "节省 {value}",
  "p.model": "P 模型", "p.memory": "P 记忆", "p.mix": "P 混合",
  "card.layer": "第 {layer} 层", "card.gate": "门", "card.branch": "分支 {branch} 的门", "card.added": "加到隐藏状态上的量：其范数的 {value}。", "card.ngrams": "第 {layer} 层的 N 元组",
  "card.ngram": "N 元组", "card.seen": "索引中次数", "card.norm": "行范数", "card.addresses": "地址，每个头一个", "card.order": "末尾 {order} 个词元", "card.times": "{count} 次",
  "card.sources": "出处", "card.sources.none": "没有找到段落。", "card.looking": "查找中……",
  "m.group.index": "精确索引", "m.group.tables": "学习到的表", "m.group.loss": "节省的损失（蓝色：变差）",
  "m.r": "r，索引对词元的贡献", "m.r.note": "r = λ × P 记忆 / P：这个词元的概率中来自精确索引的部分。",
  "m.lambda": "λ，对索引的信任", "m.lambda.note": "λ 是精确索引的门在知道词元之前放进来的比例。",
  "m.gate": "门", "m.gate.mean": "所有门的平均", "m.gate.layer": "第 {layer} 层的门", "m.gate.branch": "第 {layer} 层分支 {branch} 的门",
  "m.gate.note": "学习到的表的门，取自模型读到该词元时；行为零时约为 0.5，它影响的是下一个词元。没有哪一个门就是真相。",
  "m.added": "第 {layer} 层加入的量", "m.added.told": "加入范数的 {value}", "m.added.note": "模型读到该词元时学习到的表加入了多少：|加入| / |隐藏状态|。标尺止于本文的最大值。",
  "m.saved.both": "两者节省的损失", "m.saved.index": "索引节省的损失", "m.saved.tables": "表节省的损失", "m.saved.told": "节省 {value} 奈特",
  "m.saved.note": "模型对该词元的意外减少了多少，单位奈特。蓝色表示有害：记忆让它更不可能。", "m.tables.heat": "学习到的表",
  "scatter.title": "它跟随什么？", "scatter.lead": "每个点是一个词元。假如数值只跟随 N 元组出现的次数，频率图上的点会排成一线，而节省损失图上的不会。频率是精确索引中的计数。",
  "scatter.order": "频率取自", "scatter.words": "末尾 {n} 个词元", "scatter.frequency": "末尾 {n} 个词元出现的次数", "scatter.saved": "在它身上节省的损失，奈特", "scatter.saved.next": "在下一个词元上节省的损失，奈特",
  "scatter.saved.short": "节省的损失", "scatter.seen": "索引中次数", "scatter.against": "对", "scatter.numbers": "以表格显示", "scatter.table": "{name}、频率和节省的损失，逐个词元",
  "scatter.few": "{n} 个词元太少，无法计算相关。", "scatter.flat": "在这 {n} 个词元上，两者之一没有变化。", "scatter.said": "皮尔逊 {r}，斯皮尔曼 {rho}，{n} 个词元：{verdict}。",
  "scatter.none": "看不出联系", "scatter.some": "联系较弱", "scatter.much": "联系明显",
  "two.title": "两种记忆", "two.tables": "学习到的表", "two.tables.what": "与模型一起训练出的行。N 元组的哈希决定读哪些行，门决定把多少加到隐藏状态上。只有训练能改变它们。",
  "two.index": "精确索引", "two.index.what": "文档原文的计数。P = (1 − λ) P 模型 + λ P 记忆，门在每个词元处决定 λ。添加或删除文档，它立刻改变。",

  "think.title": "模型会说什么，文档写着什么",
  "think.lead": "下一个词元：模型自己的、精确索引的、以及两者混合的。记忆只回想同样的词之后原文怎么写，并不思考问题。",
  "think.prompt": "提示", "think.candidates": "要比较的候选，每行一个", "think.tables": "学习到的表", "think.index": "精确索引", "think.lambda": "λ，对索引的信任",
  "think.rest": "用门的 λ", "lambda.gate": "由门决定", "lambda.gate.is": "{value}，由门决定", "lambda.pinned": "{value}，已固定",
  "think.next": "下一个词元", "think.generate": "生成", "think.length": "词元", "think.empty": "没有提示。请输入，或按一个示例。", "think.done": "用时 {ms}",
  "think.match": "末尾 {depth} 个词元在文档里出现 {count} 次，见于 {documents} 篇文档：", "think.match.none": "这个提示的结尾在文档里没有出现。", "think.match.off": "索引已关闭。",
  "think.alone": "模型自己", "think.memory": "记忆（精确索引）", "think.mix": "混合，λ {value}", "think.alone.none": "没有。", "think.memory.none": "文档里没有从这里接下去的内容。",
  "think.sources": "出处", "think.written": "生成的文本", written: "{tokens} 个词元，用时 {ms}，首个在 {first} 后",
  "chances.title": "候选", "chances.lead": "每个完整候选的 P：对其词元取 (1 − λ) P 模型 + λ P 记忆 的乘积。下面是它的词元。移动 λ 来看；红色是记忆的部分。",
  "chances.candidate": "候选", "chances.share": "占这些之中", "chances.p": "P",
  "match.short": "匹配 {depth} 个词元，在 {documents} 篇文档中出现 {count} 次", "match.short.none": "没有匹配",

  "teach.title": "加入知识，提问，再拿走",
  "teach.lead": "文档一经索引立刻可用，无需训练；一经删除立刻消失。它靠措辞找到：换一种说法提问可能找不到。",
  "teach.example": "加入一个示例看看", "teach.drop": "把文本文件拖到这里", "teach.pick": "选择文件", "teach.name": "名称", "teach.paste": "或粘贴文本", "teach.add": "加入记忆",
  "teach.empty": "没有可加入的文本。请粘贴，或拖入文件。", "teach.adding": "正在索引……", "teach.deleting": "正在删除……", "teach.log": "日志", "teach.document": "文档", "teach.documents": "文档：{count}",
  "teach.delete": "删除", "teach.delete.one": "删除 {name}", "teach.more": "更多", "teach.none": "还没有文档。", "teach.no.index": "这个服务器没有索引。用 --index DIR 启动即可添加文档。",
  "teach.ask.title": "用三种方式提问", "teach.question": "问题，或句子的开头", "teach.ask": "提问", "teach.chat": "作为对话", "teach.ask.empty": "没有问题。请输入，或按一个示例。",
  "teach.asked": "删除一篇文档，再问一次。",
  "log.added": "索引了 {tokens} 个词元，用时 {ms}", "log.deleted": "删除了 {name}，用时 {ms}", "log.found": "见于 {documents} 篇文档，匹配 {depth} 个词元，λ {lambda}", "log.not.found": "记忆没有参与这个回答",
  "file.encoding": "{name} 不是 UTF-8 文本。请存为 UTF-8 后重新拖入。", "file.empty": "{name} 是空的。", "file.large": "{name} 有 {size}，一次请求最多 {limit}，请拆分。", "file.unread": "无法读取 {name}。",
  "arm.alone": "模型自己", "arm.alone.what": "不用精确索引", "arm.retrieval": "检索", "arm.retrieval.what": "把段落放进提示", "arm.memory": "记忆", "arm.memory.what": "混入精确索引，提示里不加内容",
  cost: "提示 {prompt} 个词元，生成 {tokens} 个，用时 {ms}，首个在 {first} 后",

  "quiz.title": "闭卷", "quiz.lead": "一家虚构公司的事实，谁也不可能事先知道。您先回答。用文档原话的题和换了说法的题分开计分，因为记忆回想的是措辞：后一类显示它做不到什么。",
  "quiz.count": "第 {place} 题，共 {all} 题", "quiz.verbatim": "文档原话", "quiz.paraphrased": "换了说法", "quiz.yours": "您的回答", "quiz.answer": "回答", "quiz.unknown": "不知道", "quiz.skip": "跳过", "quiz.next": "下一题",
  "quiz.expected": "文档写着：", "quiz.from": "见 {name}", "quiz.table": "回答", "quiz.told": "答对：{names}。", "quiz.none": "这个服务器没有测验。", "quiz.end": "这是最后一题", "quiz.end.what": "分数保留到刷新页面为止。", "quiz.again": "从头开始",
  "quiz.scores": "得分", "quiz.scores.caption": "答对数与作答数", "quiz.scores.note": "答对 / 已问",
  player: "选手", answer: "回答", result: "结果", time: "用时", "prompt.tokens": "提示词元", right: "对", wrong: "错", nobody: "没有",
  "player.you": "您", "player.alone": "模型自己", "player.retrieval": "检索", "player.memory": "记忆",
};

export const all = { en, zh };

/** "en" or "zh", as the document says. */
export const language = () => (document.documentElement.lang.startsWith("zh") ? "zh" : "en");

/** The words of this key, with {names} filled in; {count:time} is "1 time" or "2 times". */
export function word(key, values = {}) {
  const text = all[language()][key];
  if (text === undefined) throw new Error(`no words for ${key}`);
  return text.replace(/\{(\w+)(?::([^}]+))?\}/g, (_, name, noun) => {
    const value = String(values[name]);
    return noun ? `${value} ${noun}${value === "1" ? "" : "s"}` : value;
  });
}

/** Fills every element that names its words: data-w its text, data-w-label its accessible name. */
export function speak(root = document) {
  for (const node of root.querySelectorAll("[data-w]")) node.textContent = word(node.dataset.w);
  for (const node of root.querySelectorAll("[data-w-label]")) node.setAttribute("aria-label", word(node.dataset.wLabel));
}
